"""What reading a launch ends with where there is nothing to check."""

from __future__ import annotations


class UnreadableLaunch(ValueError):
    """A launch that could not be read: no such file, no bash, no call of a training program."""
