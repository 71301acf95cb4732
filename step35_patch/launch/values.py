"""Text of a shell script in which what is not known stays where it was.

A value that the script takes from elsewhere, such as a variable of the batch system or the output
of a command, is a name between two characters that no script holds. Text is cut, joined and
compared around it; whether the rest is known is asked of the result.
"""

from __future__ import annotations

import re

# In a name a slash is another character, so that paths are cut around it.
_OPEN, _CLOSE, _SLASH = "\ue000", "\ue001", "\ue002"
_UNKNOWN = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


def unknown(name: str) -> str:
    """The text that stands for a value of this name: a variable's, or `$(command)`."""
    return f"{_OPEN}{shown(name).replace('/', _SLASH)}{_CLOSE}"


def unknowns(text: str) -> list[str]:
    """The names of what is not known in a text, in order; empty if all is."""
    return [name.replace(_SLASH, "/") for name in _UNKNOWN.findall(text)]


def shown(text: str) -> str:
    """A text for a person: `$NAME` and `$(command)` where they are not known."""
    return _UNKNOWN.sub(r"$\1", text).replace(_SLASH, "/")


def split(text: str) -> list[str]:
    """What bash makes of an unquoted expansion with the default IFS.

    The first and the last entry are empty where the text begins or ends with white space, so that
    what stands beside it in the script is a word of its own. An unknown part is not split.
    """
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match.group())
        return f"{_OPEN}{len(kept) - 1}{_CLOSE}"

    parts = re.split(r"[ \t\n]+", _UNKNOWN.sub(keep, text))
    return [_UNKNOWN.sub(lambda match: kept[int(match.group(1))], part) for part in parts]
