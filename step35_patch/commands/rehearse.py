"""`step35-patch rehearse`: a launch command on this CPU, with the model shrunk."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from step35_patch.commands.launch_input import add_script_arguments, read_launch, without_a_gpu

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config
    from step35_patch.launch.check import Report
    from step35_patch.launch.command import TrainingCommand
    from step35_patch.launch.rehearsal import Plan

_LOGGED = re.compile(r"iteration +(\d+)/ *\d+ \|.* lm loss: (\S+) \|(?:.*?grad norm: (\S+) \|)?")
_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")
# Python imports it at the start of each process, so that the training program stays as it is, and
# the processes that it starts itself have the stand-in too.
_STAND_IN = """import os
if "RANK" in os.environ:
    from step35_patch import cpu
    cpu.install()
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch rehearse`."""
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="the model's config, where the launch's own STEP35_CONFIG is not on this machine",
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=4, help="at most that many (default: 4)"
    )
    parser.add_argument("--gpus", metavar="N", type=int, help="how many the launch has")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="leave config, logs and checkpoint there"
    )
    add_script_arguments(parser)
    parser.usage = (
        "step35-patch rehearse [-h] [--config PATH] [--processes N] [--gpus N] [--keep DIR] "
        "[--call N] [--set NAME=VALUE] -- COMMAND ..."
    )
    command = "torchrun or python with a training program, or a script for bash"
    parser.epilog = f"COMMAND: {command}. {parser.epilog}"
    parser.set_defaults(run=run)


class _Failed(Exception):
    """A run ended with an error; says which."""


def run(options: argparse.Namespace) -> int:
    """Rehearse; returns the exit status, as `--help` says."""
    from step35_patch.config.errors import Step35ConfigError
    from step35_patch.launch.errors import UnreadableLaunch

    try:
        script, options.words = _script_of(options.words)
        launch = read_launch(options, script)
        config = _config(launch.command, options.config)
        without_a_gpu()
        from step35_patch.commands.upstream_notices import without_upstream_notices
        from step35_patch.launch.check import check

        with without_upstream_notices():
            report = check(config, launch.command, gpus=options.gpus, loose=launch.loose)
    except (UnreadableLaunch, Step35ConfigError) as error:
        print(f"step35-patch rehearse: {error}", file=sys.stderr)
        return 2
    if report.problems:
        for problem in report.problems:
            print(problem)
        print(f"{len(report.problems)} problem(s): this launch does not start")
        return 1
    try:
        _rehearse(config, report, options)
    except _Failed as error:
        print(error)
        return 1
    return 0


def _script_of(words: list[str]) -> tuple[Path | None, list[str]]:
    """The script that a command starts, and its arguments; or none, and the command."""
    rest = words[1:] if words and os.path.basename(words[0]) in ("bash", "sh", "sbatch") else words
    if rest and rest[0].endswith((".sh", ".sbatch", ".slurm")):
        return Path(rest[0]), rest[1:]
    return None, words


def _config(command: TrainingCommand, path: str | None) -> Step35Config:
    from step35_patch.config.model import Step35Config
    from step35_patch.launch.errors import UnreadableLaunch

    words = list(command.arguments)
    if path is None and "--step35-config" in words[:-1]:
        path = words[words.index("--step35-config") + 1]
    path = path or command.environment.get("STEP35_CONFIG") or os.environ.get("STEP35_CONFIG")
    if not path:
        raise UnreadableLaunch("STEP35_CONFIG: expected the model's config, found none; --config")
    if not os.path.exists(path):
        raise UnreadableLaunch(f"{path}: the model's config is not on this machine; give --config")
    return Step35Config.from_pretrained(path)


def _rehearse(config: Step35Config, report: Report, options: argparse.Namespace) -> None:
    from step35_patch.launch.rehearsal import ITERATIONS, SAVED_AT, plan

    if report.launch is None:
        raise _Failed("its layout is not known; give --gpus")
    small = plan(config, report.launch, report.command.arguments, options.processes)
    print("Shrunk to this machine:")
    for line in small.changes:
        print(f"  {line}")
    print("Stages, with layers of the launch's in place of which they stand:")
    for stage in small.stages:
        layers = ", ".join(_kind(config, index) for index in stage.layers) or "no layer"
        print(f"  rank {stage.pp}, part {stage.vpp}: {layers}", flush=True)
    with tempfile.TemporaryDirectory(prefix="step35-rehearsal-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(small.config))
        (folder / "sitecustomize.py").write_text(_STAND_IN)
        save = ["--save", str(folder / "checkpoint"), "--save-interval", str(SAVED_AT)]
        first = _train(report, small, folder, "first", [*save, "--exit-interval", str(SAVED_AT)])
        resume = [
            "--load",
            str(folder / "checkpoint"),
            "--exit-on-missing-checkpoint",
            *small.resume,
        ]
        second = _train(report, small, folder, "resumed", resume)
    expected = list(range(SAVED_AT + 1, ITERATIONS + 1))
    if sorted(first) != list(range(1, SAVED_AT + 1)) or sorted(second) != expected:
        raise _Failed(f"expected iterations 1 to {ITERATIONS}, found {[*first, *second]}")
    print("this launch script starts")


def _kind(config: Step35Config, index: int) -> str:
    plan = config.layers[index]
    words = [plan.attention_type.removesuffix("_attention"), "MoE" if plan.is_moe else "dense"]
    return f"{index} ({'MTP, ' * plan.is_mtp}{', '.join(words)})"


def _train(
    report: Report, small: Plan, folder: Path, name: str, more: list[str]
) -> dict[int, float]:
    """One run to its end; each iteration's loss."""
    from step35_patch.arguments import CPU_ARGUMENTS
    from step35_patch.commands.demo import example_script

    command = report.command
    program = command.program
    if not os.path.isfile(program):
        print(
            f"{name}: {program or 'no program'} is not here; {example_script().name} in its place"
        )
        program = str(example_script())
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(small.processes)]
    words += ["-m", "step35_patch"] if command.through_package else []
    words += [program, *CPU_ARGUMENTS, *small.arguments, *more]
    log = folder / f"{name}.log"
    losses: dict[int, float] = {}
    with (
        log.open("w") as file,
        subprocess.Popen(  # noqa: S603  # nosec B603  # the user's own command, no shell
            words,
            env=_environment(command.environment, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            if match := _LOGGED.search(line):
                losses[int(match[1])] = float(match[2])
                norm = f"  grad norm {match[3]}" if match[3] else ""
                print(f"{name}: iteration {match[1]}  loss {float(match[2]):.4f}{norm}", flush=True)
    if process.returncode:
        raise _Failed(_first_error(log.read_text(), words))
    return losses


def _environment(variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The launch's own variables, as far as they are known, and the rehearsal's."""
    from step35_patch.launch.values import unknowns

    known = {name: value for name, value in variables.items() if not unknowns(value)}
    own = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    path = os.pathsep.join(filter(None, [str(folder), own.get("PYTHONPATH")]))
    return (
        own
        | known
        | {
            "STEP35_PATCH": "1",
            "STEP35_CONFIG": str(folder / "config.json"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "ignore",
            "PATH": own.get("PATH", os.defpath),
        }
    )


def _of_rank(line: str) -> str:
    """A line of torchrun's output without its rank."""
    return re.sub(r"^\[rank\d+\]: ", "", line)


def _first_error(log: str, words: list[str]) -> str:
    """The first exception that a rank ended with, and the arguments that it names."""
    lines = log.splitlines()
    found = next((i for i, line in enumerate(lines) if _ERROR.match(_of_rank(line))), None)
    if found is None:
        shown = "\n".join(lines[-20:])
    else:
        shown = _of_rank(lines[found])
        if ":" not in shown:  # without a message: the statement says it
            before = [_of_rank(line) for line in lines[max(found - 3, 0) : found]]
            shown = "\n".join([*before, shown])
    named = [
        word
        for word in words
        if word.startswith("--")
        and re.search(
            rf"\b{re.escape(word[2:])}\b|\b{re.escape(word[2:].replace('-', '_'))}\b", shown
        )
    ]
    about = f" (about {', '.join(dict.fromkeys(named))})" if named else ""
    return f"this launch does not start{about}: {shown}"
