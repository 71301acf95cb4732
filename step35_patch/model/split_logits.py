"""Losses are computed of logits that tensor parallelism has cut, whatever logits a model returns.

Megatron-Core's cross entropy takes each rank's part of the vocabulary. A GPTModel with
`parallel_output=False` gathers the logits for it as well: over several ranks every loss then counts
each token of the vocabulary once a rank, and over one rank backward fails, in a view.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch


def split_for_losses(model: torch.nn.Module) -> None:
    """Let a GPTModel gather its logits only where it returns them, which is without labels."""
    model.register_forward_pre_hook(
        functools.partial(_forward_pre_hook, signature=inspect.signature(model.forward)),
        with_kwargs=True,
    )


def _forward_pre_hook(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: inspect.Signature,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = signature.bind_partial(*args, **kwargs).arguments
    if given.get("labels") is None or given.get("output_processor") is not None:
        return None  # logits are returned, or handed to a function of the caller's
    return args, kwargs | {"runtime_gather_output": False}
