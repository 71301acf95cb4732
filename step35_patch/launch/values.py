"""Text of a shell script in which what is not known stays where it was.

A value that the script takes from elsewhere, such as a variable of the batch system or the output
of a command, is its name in letters of its own, which no script holds and bash takes for letters:
they are no white space, no slash and no quote, so that text is cut, joined, parsed and compared
around them. Whether the rest is known is asked of the result.
"""

from __future__ import annotations

import re

_OPEN, _CLOSE = "\ue000", "\ue001"
# A plane of Unicode that is set aside for private use, and as large as the one of all scripts.
_PLANE = 0xF0000
_UNKNOWN = re.compile(f"{_OPEN}([{chr(_PLANE)}-{chr(_PLANE + 0xFFFD)}]*){_CLOSE}")


def unknown(name: str) -> str:
    """The text that stands for a value of this name: a variable's, or `(command)`."""
    letters = (chr(_PLANE + min(ord(letter), 0xFFFD)) for letter in shown(name))
    return f"{_OPEN}{''.join(letters)}{_CLOSE}"


def unknowns(text: str) -> list[str]:
    """The names of what is not known in a text, in order; empty if all is."""
    return [_name(letters) for letters in _UNKNOWN.findall(text)]


def shown(text: str) -> str:
    """A text for a person: `$NAME` and `$(command)` where they are not known."""
    return _UNKNOWN.sub(lambda match: f"${_name(match[1])}", text)


def split(text: str) -> list[str]:
    """What bash makes of an unquoted expansion with the default IFS.

    The first and the last entry are empty where the text begins or ends with white space, so that
    what stands beside it in the script is a word of its own.
    """
    return re.split(r"[ \t\n]+", text)


def _name(letters: str) -> str:
    return "".join(chr(ord(letter) - _PLANE) for letter in letters)
