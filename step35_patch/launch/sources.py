"""The files of a launch: scripts as text, and what a batch system would set by them."""

from __future__ import annotations

import re
from pathlib import Path

from step35_patch.config.plain_file import open_plain
from step35_patch.launch.errors import UnreadableLaunch

_MOST_BYTES = 4 * 1024**2


def read_source(path: Path) -> str:
    """A script's text.

    Raises:
        UnreadableLaunch: there is no such file, or it is no text.
    """
    try:
        with open_plain(path) as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UnreadableLaunch(f"{path}: {error.strerror or error}") from error
    if len(content) > _MOST_BYTES:
        raise UnreadableLaunch(f"{path}: expected a launch script, found more than 4 MiB")
    try:
        source = content.decode()
    except UnicodeDecodeError as error:
        raise UnreadableLaunch(f"{path}: expected a launch script, found no UTF-8 text") from error
    if "\0" in source:
        raise UnreadableLaunch(f"{path}: expected a launch script, found a binary file")
    return source


def batch_variables(source: str) -> dict[str, str]:
    """What Slurm sets by a script's #SBATCH lines."""
    found: dict[str, str] = dict(
        re.findall(r"^#SBATCH\s+--?([\w-]+)[ =]+(\S+)", source, re.MULTILINE)
    )
    nodes = found.get("nodes", found.get("N"))
    tasks = found.get("ntasks-per-node")
    gpus = (found.get("gpus-per-node") or found.get("gres") or "").rpartition(":")[2]
    variables = {
        "SLURM_NNODES": nodes,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_NTASKS_PER_NODE": tasks,
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_GPUS_PER_NODE": gpus,
        "SLURM_NTASKS": found.get("ntasks"),
    }
    if variables["SLURM_NTASKS"] is None and nodes and tasks and (nodes + tasks).isdigit():
        variables["SLURM_NTASKS"] = str(int(nodes) * int(tasks))
    return {name: value for name, value in variables.items() if value and value.isdigit()}
