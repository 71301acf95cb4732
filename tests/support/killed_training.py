"""Megatron's training loop, killed and started again from its newest checkpoint.

A run that nothing disturbs says what each checkpoint has to hold. What Megatron names in
latest_checkpointed_iteration.txt after a kill is held against it, weights and optimizer's state to
the bit, and so are the places in the data, of the random numbers and of the learning rate.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp

from support import layout_runs, traces
from support.conversion_runs import Ended
from support.conversion_world import TRACKER

# What one of the kills waits for of a checkpoint that is being saved.
STAGES = {"folder": "", "data": "*.distcp", "metadata": ".metadata*"}
_ITERATION = re.compile(rb"iteration +(\d+)/ *\d+ \|")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
# Of the common state: the arguments name the folders, which differ.
_PLACES = ("args", "content_metadata")


class Run(Protocol):
    """A training under way."""

    log: Path

    def has_ended(self) -> bool: ...
    def wait(self) -> Ended: ...


class Launched:
    """A training in processes of its own, started as a user does it.

    Args:
        command: the words.
        log: for all that it writes; its folder is where it runs.
        variables: of its environment, besides those of the layouts' runs.
    """

    def __init__(self, command: list[str], log: Path, variables: Mapping[str, str]):
        self.log, self.mark = log, f"{os.getpid()} {log}"
        variables = {**layout_runs.environment(), traces.VARIABLE: self.mark, **variables}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                env=variables | {"PYTHONUNBUFFERED": "1"},
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> Ended:
        return Ended(self.process.wait(timeout=600), self.log.read_text(errors="replace"))

    def processes(self) -> set[int]:
        return traces.processes(self.mark)

    def signal(self, number: int) -> None:
        """SIGKILL to all processes, as a container's end is one; another to those of its group.

        torchrun hands SIGTERM on to its workers, which have groups of their own. What ends it by
        SIGKILL alone leaves them training, and saving.
        """
        if number == signal.SIGKILL:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        else:
            os.killpg(self.process.pid, number)


def arguments(save: Path, iterations: int, interval: int, processes: int = 1) -> list[str]:
    """Of the example script: with all that a checkpoint has to bring back, from the newest one."""
    rest = f"""
        --global-batch-size {2 * processes} --moe-router-bias-update-rate 1e-3
        --lr-decay-style cosine --min-lr 1e-5 --lr-warmup-iters 5
        --save-interval {interval}
    """
    words = [*layout_runs.arguments(iterations), *rest.split()]
    if processes > 1:
        # Megatron's distributed optimizer does not resume with torch's Adam, the one of a CPU.
        words += ["--expert-model-parallel-size", str(processes)]
    return [*words, "--save", str(save), "--load", str(save)]


def command(words: list[str], processes: int = 1) -> list[str]:
    """The command that a user types."""
    if processes == 1:
        return [sys.executable, str(layout_runs.SCRIPT), *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(processes), str(layout_runs.SCRIPT), *words]


def folder_of(save: Path, iteration: int) -> Path:
    return save / f"iter_{iteration:07d}"


def reached(run: Run) -> int:
    """The last iteration that was logged; 0 if none was."""
    if not run.log.exists():
        return 0
    with open(run.log, "rb") as file:
        file.seek(max(0, run.log.stat().st_size - 50_000))
        found = _ITERATION.findall(file.read())
    return int(found[-1]) if found else 0


def logged(log: str) -> list[int]:
    """All iterations that a log has, in order."""
    return [int(number) for number in _ITERATION.findall(log.encode())]


def wait_until(run: Run, condition: Callable[[], object], seconds: float = 300) -> bool:
    """Whether it came true before the run ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if run.has_ended():
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(run.log.read_text(errors="replace")[-4000:])
        time.sleep(0.001)
    return True


def wait_for_step(run: Run, iteration: int, chance: random.Random) -> bool:
    """Until somewhere within the step after an iteration."""
    there = wait_until(run, lambda: reached(run) >= iteration)
    time.sleep(chance.uniform(0, 0.05))
    return there and not run.has_ended()


def wait_for_save(run: Run, save: Path, iteration: int, stage: str, chance: random.Random) -> bool:
    """Until so much of an iteration's checkpoint is there, and some milliseconds on."""
    folder, pattern = folder_of(save, iteration), STAGES[stage]
    there = wait_until(run, lambda: reached(run) >= iteration)
    began = time.time()  # a killed run may have left such files

    def is_there() -> bool:
        paths = folder.glob(pattern) if pattern else [folder] if folder.exists() else []
        with contextlib.suppress(FileNotFoundError):  # one that is being renamed
            return any(not pattern or path.stat().st_mtime > began for path in paths)
        return False

    there = there and wait_until(run, is_there)
    time.sleep(chance.uniform(0, 0.02))
    return there and not run.has_ended()


# --- Checkpoints --------------------------------------------------------------------------------


def named(save: Path) -> int | None:
    """The iteration of the newest checkpoint, as Megatron names it; None if it does not."""
    try:
        return int((save / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def announced(log: str) -> list[int]:
    """The iterations of which a log says that they are saved."""
    return [int(number) for number in _SAVED.findall(log)]


def differences(folder: Path, wanted: Path) -> list[str]:
    """What two checkpoints of an iteration don't have in common, to the bit."""
    ours, theirs = (_contents(path) for path in (folder, wanted))
    return sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )


def _contents(folder: Path) -> dict[str, Any]:
    """All that is stored, by name: bytes, and of the common state how it reads."""
    contents: dict[str, Any] = {
        name: (tensor.shape, tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in layout_runs.stored_tensors(folder).items()
    }
    for index, place in dcp.FileSystemReader(folder).read_metadata().storage_data.items():
        if index.fqn in contents:
            continue
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if index.fqn.startswith("common_state"):
            (state,) = torch.load(io.BytesIO(data), weights_only=False)
            contents |= {name: repr(v) for name, v in state.items() if name not in _PLACES}
        elif index.fqn.startswith("rng_state"):
            (state,) = torch.load(io.BytesIO(data), weights_only=False)
            contents[index.fqn] = [_random_state(rank) for rank in state]
        else:
            contents[index.fqn] = data
    return contents


def _random_state(state: dict[str, Any]) -> dict[str, Any]:
    """Without that of torch's CPU, from which only the data loaders draw, once a start."""
    return {name: _plain(value) for name, value in state.items() if name != "torch_rng_state"}


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, which are compared as a whole."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
