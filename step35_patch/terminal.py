"""Lines of text, and on a terminal one below them that is drawn again and again."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text


class _Console(Console):
    """rich's, without what would outlive or end a run."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is: a run that is killed could not bring it back."""
        return False

    def on_broken_pipe(self) -> None:
        """Fall silent, where rich would end the process."""
        self.quiet = True


class StatusLine:
    """What a long run says on a stream; to be used by one thread at a time.

    That the reader of the stream has gone away is no error.

    Args:
        stream: where the lines go.

    Attributes:
        drawn: whether the stream is a terminal that a line can be drawn on again and again;
            `show` does nothing on others.
    """

    def __init__(self, stream: TextIO):
        self.drawn = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._stream = stream
        self._console: _Console | None = None
        if self.drawn:
            self._console = _Console(
                file=stream, force_terminal=True, markup=False, emoji=False, highlight=False
            )
        self._live: Live | None = None

    def say(self, text: str) -> None:
        """Print lines of text, above the one that is drawn."""
        with contextlib.suppress(BrokenPipeError):
            if self._console is not None:
                self._console.print(text, soft_wrap=True)
            else:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    def show(self, text: str) -> None:
        """Draw the line, cut to the terminal's width, in place of what it was."""
        if self._console is None:
            return
        line = Text(text, no_wrap=True, overflow="crop")
        with contextlib.suppress(BrokenPipeError):
            if self._live is not None:
                self._live.update(line, refresh=True)
                return
            # Whatever stands there, such as what was typed meanwhile, makes way.
            clear = Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN)
            self._console.control(clear)
            self._live = Live(
                line,
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)

    def close(self) -> None:
        """Leave the line as it is, and go to the next one."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(BrokenPipeError):
                live.stop()
