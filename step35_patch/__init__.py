"""Train Step-3.5-Flash with released Megatron-Core. Importing this package activates it.

``import step35_patch`` registers hooks that run when Megatron-Core's modules are imported, or at
once if they are imported already (see `step35_patch.patch.activation`). It loads neither torch nor
megatron, numpy or pydantic: the names below that need them are imported on first use.
"""

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Before any module of the package is imported: by its name, which may lead to another copy.
if __name__ != "step35_patch":
    raise ImportError(
        f"{__name__}: expected the package to be imported as step35_patch, found a copy inside "
        f"{__name__.partition('.')[0]}, which would mix with an installed one. Install it (pip "
        f"install step35-patch), or put {os.path.dirname(os.path.dirname(__file__))} on PYTHONPATH "
        "and import step35_patch.",
        name=__name__,
    )
if not os.path.exists(__file__):
    raise ImportError(
        f"step35_patch: expected the package in a folder, found {__file__}, in an archive, where "
        "its data files can't be opened. Install it (pip install step35-patch), or unpack the "
        "archive.",
        name=__name__,
    )

from step35_patch import settings
from step35_patch._version import __version__
from step35_patch.patch.activation import (
    activate,
    activate_on_import,
    deactivate,
    status,
)
from step35_patch.settings import Step35ActivationError

if TYPE_CHECKING:
    from step35_patch.config.errors import Step35ConfigError
    from step35_patch.config.layer_plan import LayerPlan
    from step35_patch.config.model import Step35Config
    from step35_patch.model.layer import Step35DecoderLayer
    from step35_patch.model.provider import Step35ModelProvider

__all__ = [
    "LayerPlan",
    "Step35ActivationError",
    "Step35Config",
    "Step35ConfigError",
    "Step35DecoderLayer",
    "Step35ModelProvider",
    "__version__",
    "activate",
    "deactivate",
    "status",
]

_MODULE_OF = {
    "LayerPlan": "step35_patch.config.layer_plan",
    "Step35Config": "step35_patch.config.model",
    "Step35ConfigError": "step35_patch.config.errors",
    "Step35DecoderLayer": "step35_patch.model.layer",
    "Step35ModelProvider": "step35_patch.model.provider",
}


def _after_bridges_models(module: ModuleType) -> None:
    """Give who uses Megatron-Bridge this package's model without another import."""
    if settings.request().source is not None:
        importlib.import_module("step35_patch.bridge")


def _after_bridges_targets(module: ModuleType) -> None:
    """Let a run_config.yaml name this package's classes, in processes without a config too."""
    module.register_allowed_target_prefix("step35_patch.")


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


activate_on_import(
    {
        "megatron.bridge.models": _after_bridges_models,
        "megatron.bridge.utils.instantiate_utils": _after_bridges_targets,
    }
)
