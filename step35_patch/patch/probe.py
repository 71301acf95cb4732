"""What an interpreter finds that imports everything this package wraps: run by the diagnosis.

A process of its own, because importing Megatron-Core may fail in any way, or end the process, and
because what a launch meets is met by new processes:

    python -c "from step35_patch.patch.probe import main; main()" FILE

writes a `Findings` as JSON to the file; what the imports print goes where it always goes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from step35_patch.patch.activation import status
from step35_patch.patch.megatron_version import megatron_version
from step35_patch.patch.targets import TARGETS

BRIDGE = "megatron.bridge"
_VERSION = re.compile(r"""^(MAJOR|MINOR|PATCH|PRE_RELEASE) *= *['"]?([\w.+]*)""", re.MULTILINE)


class Failure(TypedDict):
    """Why a module could not be imported.

    Attributes:
        reason: The exception, in a line or more.
        missing: The module that is not there, if it is that; else None.
    """

    reason: str
    missing: str | None


class FoundTarget(TypedDict):
    """A target and its state, as `step35_patch.patch.status.TargetStatus` has them."""

    module: str
    attribute: str
    state: str
    required: bool


class Copy(TypedDict):
    """A Megatron that the interpreter's path leads to, by the order of the path.

    Attributes:
        folder: The entry of the path.
        version: Of its megatron.core.
        checkout: Whether it is a checkout of Megatron-LM, else an installed package.
    """

    folder: str
    version: str
    checkout: bool


class Findings(TypedDict):
    """What was found.

    Attributes:
        megatron: Version of megatron.core, or None.
        core: The entry of the path that megatron.core comes from, or None.
        training: The same of megatron.training.
        copies: All that the path leads to.
        failures: By the targets' modules.
        targets: With their states.
        torch: Version, CUDA version (None in a build without) and names of the GPUs; or why not.
        transformer_engine: Whether Megatron-Core uses it; else why it could not be imported.
    """

    megatron: str | None
    core: str | None
    training: str | None
    copies: list[Copy]
    failures: dict[str, Failure]
    targets: list[FoundTarget]
    torch: dict[str, Any]
    transformer_engine: str | None


def main() -> None:
    """Look, and write what is found to the file that is the last argument."""
    file, failures = Path(sys.argv[-1]), {}
    for module in dict.fromkeys(target.module for target in TARGETS):
        if module.startswith(f"{BRIDGE}.") and not _is_there(BRIDGE):
            failures[module] = Failure(reason=f"{BRIDGE} is not installed", missing=BRIDGE)
        elif failure := _import(module):
            failures[module] = failure
    findings = Findings(
        megatron=megatron_version(),
        core=_folder_of("megatron.core"),
        training=_folder_of("megatron.training"),
        copies=list(_copies()),
        failures=failures,
        targets=_targets(failures),
        torch=_torch(),
        transformer_engine=_transformer_engine(),
    )
    file.write_text(json.dumps(findings))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _import(module: str) -> Failure | None:
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        return Failure(reason=f"{type(error).__name__}: {error}", missing=missing)
    return None


def _targets(failures: dict[str, Failure]) -> list[FoundTarget]:
    found = []
    for target, known in zip(TARGETS, status().targets, strict=True):
        state = known.state
        if target.module in failures and state == "waiting":
            missing = failures[target.module]["missing"]
            is_megatrons = missing is not None and target.module.startswith(missing)
            state = "missing" if is_megatrons else "not importable"
        found.append(
            FoundTarget(
                module=target.module,
                attribute=target.attribute,
                state=state,
                required=target.required,
            )
        )
    return found


def _folder_of(module: str) -> str | None:
    """The entry of the path that a package of Megatron's comes from."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    # A package without an __init__.py has no file, but folders.
    places = list(spec.submodule_search_locations or ()) if spec else []
    return str(Path(os.path.abspath(places[0])).parents[1]) if places else None


def _copies() -> Iterator[Copy]:
    folders = dict.fromkeys(os.path.abspath(entry) for entry in sys.path)
    if core := _folder_of("megatron.core"):
        folders[core] = None  # an editable install is not on the path
    for folder in folders:
        with contextlib.suppress(OSError):
            text = Path(folder, "megatron", "core", "package_info.py").read_text("utf-8")
            found = dict(_VERSION.findall(text))
            numbers = ".".join(found.get(name, "?") for name in ("MAJOR", "MINOR", "PATCH"))
            yield Copy(
                folder=folder,
                version=numbers + found.get("PRE_RELEASE", ""),
                checkout=Path(folder, "pretrain_gpt.py").exists(),
            )


def _torch() -> dict[str, Any]:
    if failure := _import("torch"):
        return {"reason": failure["reason"]}
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())],
    }


def _transformer_engine() -> str | None:
    """None where Megatron-Core uses it."""
    module = "megatron.core.extensions.transformer_engine"
    if getattr(sys.modules.get(module), "HAVE_TE", False):
        return None
    failure = _import("transformer_engine.pytorch")
    return failure["reason"] if failure else f"{module}.HAVE_TE is False"
