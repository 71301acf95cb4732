"""Takes what tells who and where out of texts that are shown to others."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import pwd
import re
import socket
from collections.abc import Callable
from pathlib import Path

# Host names that tell nothing.
_NO_NAMES = ("localhost", "localhost.localdomain")
# Names of so few letters may be any word.
_SHORT = 3


def without_private_words() -> Callable[[str], str]:
    """A function that puts others in the place of home folders, user and host names in a text.

    A home becomes `~`, a user's name `<user>` and the host's `<host>`, wherever no letter or digit
    stands beside it; of up to three letters, such as `a` and `vm`, only as a part of a path.
    """
    rules = [(re.compile(rf"{re.escape(home)}(?![\w.-])"), "~") for home in _homes()]
    for names, word in ((_users(), "<user>"), (_hosts(), "<host>")):
        for name in names:
            beside = "[A-Za-z0-9]"
            pattern = f"(?<!{beside}){re.escape(name)}(?!{beside})"
            if len(name) <= _SHORT:
                pattern = rf"(?<=[/\\]){re.escape(name)}(?!{beside})"
            rules.append((re.compile(pattern), word))

    def replace(text: str) -> str:
        for pattern, word in rules:
            text = pattern.sub(word, text)
        return text

    return replace


def _homes() -> list[str]:
    """The longest first."""
    homes = {os.path.expanduser("~")}
    with contextlib.suppress(KeyError):  # a user id without an entry, as containers have
        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    homes |= {os.path.realpath(home) for home in homes}
    return sorted((home for home in homes if len(Path(home).parts) > 1), key=len, reverse=True)


def _users() -> list[str]:
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")}
    with contextlib.suppress(OSError, KeyError):
        users.add(getpass.getuser())
    users |= {Path(home).name for home in _homes()}
    return sorted(filter(None, users), key=len, reverse=True)


def _hosts() -> list[str]:
    names = {socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")}
    names |= {name.partition(".")[0] for name in names}
    return sorted((n for n in names if n and n not in _NO_NAMES), key=len, reverse=True)
