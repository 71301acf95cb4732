"""The Hugging Face config: read, checked as a whole, and resolved into one plan for each layer.

Nothing here knows torch or Megatron-Core. pydantic is loaded with the first use of `Step35Config`,
so that a layer's plan and a config's problems can be had without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step35_patch.config.errors import Step35ConfigError
    from step35_patch.config.model import Step35Config, packaged_config_path

__all__ = ["Step35Config", "Step35ConfigError", "packaged_config_path"]

_MODULE_OF = {
    "Step35Config": "step35_patch.config.model",
    "Step35ConfigError": "step35_patch.config.errors",
    "packaged_config_path": "step35_patch.config.model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
