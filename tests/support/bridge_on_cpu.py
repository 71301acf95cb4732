"""Megatron-Bridge on a CPU: what it imports that is not there, stood in for.

Megatron-Bridge needs Transformer Engine even for models of the local implementation, so that
`te_on_cpu` comes with it. ModelOpt, which it asks whether a model is quantized, and Energon, a
loader of data, are empty modules here: nothing of theirs runs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from pathlib import Path

# See tools/run.py: Megatron-Bridge with all that it needs in other versions than the tests do.
FOLDER = Path(sys.prefix, "megatron-bridge")
TRANSFORMER_ENGINE = Path(sys.prefix, "transformer-engine")
EMPTY = ("modelopt", "megatron.energon")


def install() -> None:
    """To be called before the first `import megatron`, in a process with FOLDER on its path."""
    from step35_patch import cpu

    cpu.install()
    from support import te_on_cpu

    te_on_cpu.install()
    sys.meta_path.insert(0, _EmptyModules())


class _Empty(types.ModuleType):
    """A module with every name: functions that say no."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: False


class _EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in EMPTY):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
