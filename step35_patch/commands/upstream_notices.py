"""What Megatron-Core says whenever a model is built, kept out of what commands print."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

# Warnings that say nothing about a command's work, by how they begin.
_WARNINGS = (
    # Kernels for GPUs, which `step35_patch.cpu` keeps off in any case.
    "(Transformer Engine and )?Apex (is|are) not installed",
    # Megatron-Core logs with the standard library instead.
    "absl.logging is not installed",
    "Only transformer-engine>=1.7.0 supports MoE experts",
    # Its own default for CUDA graphs, which every TransformerConfig is warned of.
    "full scope is deprecated",
    # The engine that `step35_patch.commands.generate` asks for, because layers differ.
    "The static engine will be deprecated",
)
# What Megatron-Core logs for every GPTModel, which is the model that this package trains.
_GPT_MODEL, _DEPRECATED = "megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"


@contextlib.contextmanager
def without_upstream_notices() -> Iterator[None]:
    """Leave `_WARNINGS` and `_DEPRECATED` out of what is printed, for the time being."""
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message, UserWarning, r"megatron\.")
        logger = logging.getLogger(_GPT_MODEL)
        logger.addFilter(_is_not_deprecation)
        try:
            yield
        finally:
            logger.removeFilter(_is_not_deprecation)


def _is_not_deprecation(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_DEPRECATED)
