"""Megatron's training loop in a child process, as the demo runs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ITERATION = re.compile(r"iteration +(\d+)/ *\d+ \|.* lm loss: (\S+) \|(.*)")
_MTP_LOSS = re.compile(r"mtp_\d+ loss: (\S+)")
# Set by launchers, and on some clusters in every shell: the demo is one process, whoever starts it.
_LAUNCHER_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
}


class DemoError(Exception):
    """Training did not do what it should have done; says what was expected and what was found."""


def _environment(config_path: Path) -> dict[str, str]:
    """What the child process is told besides its arguments."""
    return {
        "STEP35_CONFIG": str(config_path),
        "CUDA_VISIBLE_DEVICES": "",
        # Its matrices are too small to share, and threads that wait for each other on a busy
        # machine make an iteration take seconds.
        "OMP_NUM_THREADS": "1",
    }


def for_a_shell(config_path: Path, command: list[str]) -> str:
    """The command as it can be pasted into a shell, a few arguments a line."""
    variables = [f"{name}={shlex.quote(v)}" for name, v in _environment(config_path).items()]
    words = " ".join([*variables, *map(shlex.quote, command)])
    words = re.sub(r"(--\S+) (?!--)", "\\1\0", words)  # an option and its value stay together
    lines = textwrap.wrap(
        words, 94, break_long_words=False, break_on_hyphens=False, subsequent_indent="  "
    )
    return textwrap.indent(" \\\n".join(lines).replace("\0", " "), "    ")


@dataclass(frozen=True)
class Training:
    """What a child process wrote.

    Attributes:
        losses: the logged loss of each iteration (nats a token).
        report: what step35_patch said that it had patched.
    """

    losses: dict[int, float]
    report: str


def train(command: list[str], config_path: Path, log: Path, title: str, verbose: bool) -> Training:
    """Run the script to its end, showing its progress.

    Args:
        command: as a list of words, with --train-iters.
        config_path: the model's config.json.
        log: what the script writes is appended to this file.
        title: what the run is for, in a word.
        verbose: show what the script writes, in place of the progress.

    Raises:
        DemoError: the script did not end with exit status 0; carries the end of its output.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
    environment |= _environment(config_path) | {"PYTHONUNBUFFERED": "1"}
    iterations = int(command[command.index("--train-iters") + 1])
    progress = None if verbose else _Progress(title, iterations)
    losses: dict[int, float] = {}
    lines: list[str] = []
    process = subprocess.Popen(  # noqa: S603  # nosec B603  # the demo's own command, no shell
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        with log.open("a") as log_file:
            for line in process.stdout or ():
                log_file.write(line)
                log_file.flush()
                lines.append(line.rstrip())
                if progress is None:
                    print(line, end="", flush=True)
                if match := _ITERATION.search(line):
                    iteration, loss = int(match[1]), float(match[2])
                    losses[iteration] = loss
                    if progress is not None:
                        mtp_losses = [float(x) for x in _MTP_LOSS.findall(match[0])]
                        progress.show(iteration, loss, mtp_losses)
        status = process.wait()
    finally:
        if progress is not None:
            progress.close()
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status != 0:
        tail = "\n".join(lines[-25:])
        raise DemoError(f"the script ended with status {status}. Its last lines ({log}):\n{tail}")
    return Training(losses, "\n".join(_report(lines)))


def _report(lines: list[str]) -> Iterator[str]:
    """The lines of step35_patch's own report: its heading and what is indented below it."""
    inside = False
    for line in lines:
        continues = inside and line.startswith(("active", "  "))
        inside = line.startswith("step35_patch ") or continues
        if inside:
            yield line


class _Progress:
    """One line that is drawn again and again on a terminal; ten lines elsewhere."""

    def __init__(self, title: str, iterations: int):
        from step35_patch.terminal import StatusLine  # rich, which `demo --help` does without

        self._title, self._iterations = title, iterations
        self._line = StatusLine(sys.stdout)
        self._line.show(f"{title}: starting Megatron ...")

    def show(self, iteration: int, loss: float, mtp_losses: list[float]) -> None:
        """Say where training is; losses are in nats a token."""
        filled = 20 * iteration // self._iterations
        mtp = " ".join(f"{mtp_loss:.3f}" for mtp_loss in mtp_losses)
        text = (
            f"{self._title} [{'#' * filled}{'.' * (20 - filled)}] "
            f"{iteration:3d}/{self._iterations}  loss {loss:.3f}  MTP {mtp}"
        )
        if self._line.drawn:
            self._line.show(text)
        elif iteration == 1 or iteration % max(1, self._iterations // 10) == 0:
            self._line.say(text)

    def close(self) -> None:
        """Leave the line."""
        self._line.close()
