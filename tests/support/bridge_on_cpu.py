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

EMPTY = ("modelopt", "megatron.energon")


def install() -> None:
    """To be called before the first `import megatron`, in a process of
    `support.bridge_processes`."""
    from step35_patch import cpu

    cpu.install()
    from support import te_on_cpu

    te_on_cpu.install()
    sys.meta_path.insert(0, _EmptyModules())


class _Empty(types.ModuleType):
    """A module with every name: a class to inherit from, or a function that says no."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": _nothing, "__bool__": lambda self: False})
        setattr(self, name, made)
        return made


def _nothing(*args: object, **kwargs: object) -> None:
    pass


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


def install_training() -> None:
    """To be called before `megatron.bridge.training` is imported.

    What it asks of ModelOpt, whose module is empty here, is nothing; and Megatron-Core's helper for
    data sets is not compiled, which needs a compiler: mock data do without.
    """
    import megatron.core.datasets.utils as helpers

    helpers.compile_helpers = lambda: None
    import megatron.bridge.training.checkpointing as checkpointing
    import megatron.bridge.training.eval as evaluation
    import megatron.bridge.training.train as train

    for module in (train, evaluation):
        module.get_tensor_shapes_adjust_fn_for_distillation = lambda *args, **kwargs: None
    for name in vars(checkpointing):
        if "modelopt_state" in name:
            setattr(checkpointing, name, lambda *args, **kwargs: False)
