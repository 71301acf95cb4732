"""Makes the pictures of docs/screens.md: what the commands show on a terminal, and the plot.

    python tools/screens.py             # all of `SCREENS`
    python tools/screens.py doctor      # those named

A picture is a command's real output, at each of `WIDTHS`, captured through a terminal (a pty) of
that width. Their home folder is this repository, so that paths in it are shown from `~`.
Look at the pictures afterwards: nothing compares them with what the commands print today.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "screens"
PAGE = ROOT / "docs" / "screens.md"
WIDTHS = (80, 160)
CONFIG = "step-3.5-flash"


class Screen(NamedTuple):
    """A command in the page.

    Attributes:
        words: After `step35-patch`.
        text: What the page says of it.
        variables: Of the environment, besides `ENVIRONMENT`.
        plots: Whether the picture is what the command draws, into a file that is its last word.
    """

    words: tuple[str, ...]
    text: str
    variables: Mapping[str, str] = MappingProxyType({})
    plots: bool = False


# One row for each command that is shown, by the name of its pictures.
SCREENS = {
    "inspect": Screen(("inspect", CONFIG), "What each layer computes, and exact totals."),
    "plot": Screen(
        ("inspect", CONFIG, "--pipeline-layout", "Ett|(tt|)*21t|mmmL", "--pp", "8", "--plot"),
        "The same layers as a picture, with the stages of examples/sft_arguments.sh.",
        plots=True,
    ),
    "doctor": Screen(
        ("doctor",),
        "What a launch would meet, here on a machine without a GPU.",
        {"STEP35_PATCH": "1", "STEP35_CONFIG": "step35_patch/data/step-3.5-flash.json"},
    ),
    "doctor-wrong": Screen(
        ("doctor",),
        "The same with two variables that are wrong.",
        {"STEP35_PATCH": "1", "STEP35_CONFIG": "models/Step-3.5-Flash", "STEP35_WINDOW": "513"},
    ),
}
_SCRIPT = "tests/launch/scripts/arrays.sh"
SCREENS |= {
    "check": Screen(
        ("check", CONFIG, "--script", _SCRIPT, "--gpu-memory", "110"),
        "A launch script without a mistake, and how evenly its stages are loaded.",
    ),
    "check-wrong": Screen(
        (
            *("check", CONFIG, "--script", _SCRIPT, "--gpus", "32", "--"),
            *("--globl-batch-size", "64", "--seq-length", "131080", "--num-layers", "48"),
        ),
        "The same script with arguments that are wrong.",
    ),
    "estimate": Screen(
        (
            *("estimate", CONFIG, "--pp", "8", "--cp", "8", "--ep", "8", "--etp", "1"),
            *("--pipeline-layout", "Ett|(tt|)*21t|mmmL", "--seq-length", "131072"),
            *("--optimizer", "muon", "--use-distributed-optimizer", "--recompute", "full"),
            *("--gpu-memory", "80"),
        ),
        "What the authors' layout costs on 64 GPUs.",
    ),
}
# The version of a Megatron-Core inside a repository would end in that repository's commit.
ENVIRONMENT = {
    "HOME": str(ROOT),
    "NO_VCS_VERSION": "1",
    "PYTHONPATH": str(ROOT),
    "TERM": "xterm-256color",
}


def captured(screen: Screen, width: int) -> str:
    """What a command writes to a terminal of this width."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen(
        command(screen), stdin=writer, stdout=writer, stderr=subprocess.DEVNULL, **where(screen)
    )
    os.close(writer)
    parts = []
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # the command has ended
            break
        if not part:
            break
        parts.append(part)
    os.close(reader)
    process.wait()
    return b"".join(parts).decode().replace("\r\n", "\n")


def command(screen: Screen) -> list[str]:
    return [sys.executable, "-m", "step35_patch.cli", *screen.words]


def where(screen: Screen) -> dict[str, object]:
    own = ("STEP35_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    # What is cached under a home folder would otherwise be left in the repository.
    caches = dict.fromkeys(("XDG_CACHE_HOME", "MPLCONFIGDIR"), tempfile.gettempdir())
    return {"cwd": ROOT, "env": kept | ENVIRONMENT | caches | screen.variables}


def draw(screen: Screen, width: int, file: Path) -> None:
    """Write the picture of a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    set_before = "".join(f"{name}={value} " for name, value in screen.variables.items())
    words = " ".join(["step35-patch", *screen.words])
    console.print(Text(f"$ {set_before}{words}", "dim"))
    console.print(Text.from_ansi(captured(screen, width)), soft_wrap=True)
    file.write_text(console.export_svg(title=words, unique_id=file.stem) + "\n")


def page() -> str:
    """docs/screens.md."""
    lines = [
        "# Screens",
        "",
        "What the [commands](commands.md) show on terminals of 80 and 160 columns. Made by "
        "[tools/screens.py](../tools/screens.py).",
    ]
    for name, screen in SCREENS.items():
        lines += ["", f"## {name}", "", screen.text]
        for file in pictures(name):
            lines += ["", f"![{name}]({file.relative_to(PAGE.parent)})"]
    return "\n".join(lines) + "\n"


def pictures(name: str) -> list[Path]:
    if SCREENS[name].plots:
        return [FOLDER / f"{name}.svg"]
    return [FOLDER / f"{name}-{width}.svg" for width in WIDTHS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of docs/screens.md.")
    parser.add_argument("names", nargs="*", choices=[*SCREENS, []], help="default: all")
    names = parser.parse_args().names or list(SCREENS)
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        screen, files = SCREENS[name], pictures(name)
        if screen.plots:
            plot = screen._replace(words=(*screen.words, str(files[0])))
            subprocess.run(command(plot), stdout=subprocess.DEVNULL, check=True, **where(plot))
            continue
        for width, file in zip(WIDTHS, files, strict=True):
            draw(screen, width, file)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
