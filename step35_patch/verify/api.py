"""Compare transformers' Step-3.5 with this package's on the same tokens, layer by layer.

Each side carries its own hidden states through the model, which shows how far the two end up apart.
Besides, each part of ours (embedding, layer, output matrix) is given what the reference's part was
given, which shows where the two part: a wrong layer is named, and not all layers behind it.

Weights are read when the module that uses them is called and dropped right after, on both sides, so
that a model of any size fits: at most `largest_weights` bytes of them at a time, twice that while
they are read and converted, and activations that grow with the number of tokens. The published
model in float32 needs 0.37 GB of weights at a time, and about 2 GB altogether at 1024 tokens.

Importing this module loads neither torch nor Megatron-Core, before which the CPU has to be set up;
`step35_patch.verify.by_layer` does the work.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from step35_patch.tensors.published import Weights
from step35_patch.verify.pieces import largest_weights
from step35_patch.verify.report import LogitsAgreement, Part, Report

if TYPE_CHECKING:
    import torch

    from step35_patch.config.model import Step35Config

__all__ = [
    "LogitsAgreement",
    "Part",
    "ReferenceMissingError",
    "Report",
    "Weights",
    "compare",
    "largest_weights",
    "sequence_length",
]

# Tokens behind the window, at least: enough for a few blocks of a tiny model's window.
_BEYOND_WINDOW = 64
_INSTALL = 'pip install "transformers>=5.23"'


class ReferenceMissingError(ImportError):
    """transformers, which is what is compared with, is missing or too old."""


def compare(
    hf_dir: str | os.PathLike[str],
    *,
    source: Weights | None = None,
    length: int | None = None,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    accept_rounded_router_bias: bool = False,
    dequantize_fp8: bool = False,
    on_part: Callable[[Part], None] | None = None,
) -> Report:
    """Compare transformers' Step-3.5 with this package's on random tokens, on the CPU.

    In float32 a part agrees up to 1e-4 of its own change, in bfloat16 up to 5e-2. A position at
    which two experts score nearly alike (1e-5 and 2e-2) is not counted as a difference of its
    layer, but changes what follows: in a model with hundreds of experts, end to end logits of a few
    positions may differ in the third digit though every layer agrees.

    Megatron-Core runs on the CPU by `step35_patch.cpu.install`, which lasts for the process.
    torch.distributed and Megatron-Core's groups are initialised for the call unless they are.

    Args:
        hf_dir: a folder in the published layout, or one of transformers' `save_pretrained`; the
            reference's weights, and config.json.
        source: our side's weights; those of `hf_dir` by default.
        length: tokens of each sequence; more than the sliding window. See `sequence_length`.
        batch: sequences.
        seed: of the tokens. The config's pad_token_id is not among them.
        dtype: what both sides compute in, torch.float32 (default) or torch.bfloat16; the router
            computes in float32.
        mtp: with the MTP layers.
        accept_rounded_router_bias: of `hf_dir`, for both sides: see
            `step35_patch.convert.convert_to_megatron`.
        dequantize_fp8: the same.
        on_part: called with each part as soon as it is computed.

    Raises:
        Step35ConfigError: the folder's config is not a legal one.
        CheckpointError: the folder's weights are not those of its config.
        ValueError: `length` is not beyond the window, or another argument is not legal.
        ReferenceMissingError: there is no transformers with Step-3.5.
        RuntimeError: the process is one of several, or has a CUDA device.
    """
    from step35_patch.config.model import Step35Config

    config = Step35Config.from_pretrained(hf_dir)
    length = sequence_length(config, length)
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, found {batch}")

    from step35_patch import cpu

    cpu.install()
    check_reference()
    from step35_patch.verify.by_layer import compare_layers

    return compare_layers(
        hf_dir,
        config,
        source,
        shape=(batch, length),
        seed=seed,
        dtype=dtype,
        mtp=mtp,
        accept_rounded_router_bias=accept_rounded_router_bias,
        dequantize_fp8=dequantize_fp8,
        on_part=on_part,
    )


def sequence_length(config: Step35Config, length: int | None = None) -> int:
    """The length to compare at: `length` if it is beyond the window, else an error.

    None means twice the sliding window, or 64 tokens more than it if that is longer, but no more
    than max_position_embeddings.

    Raises:
        ValueError: the length is not beyond the window, so that it could not show an error in it.
    """
    window = sliding_window(config) or 1
    if length is None:
        length = max(2 * window, window + _BEYOND_WINDOW)
        length = min(length, config.max_position_embeddings)
    if length <= window:
        raise ValueError(
            f"length: expected more than the sliding window's {window} tokens, found {length}: a "
            "shorter sequence cannot show an error in the window"
        )
    return length


def sliding_window(config: Step35Config) -> int | None:
    """The config's sliding window in keys; None if no layer slides, whatever the field says."""
    if all(plan.window_size is None for plan in config.layers):
        return None
    return config.sliding_window


def check_reference() -> None:
    """Import transformers' Step-3.5.

    Raises:
        ReferenceMissingError: there is none; says what is installed and what to install.
    """
    try:
        importlib.import_module("transformers.models.step3p7")
    except ImportError as error:
        raise ReferenceMissingError(
            "expected transformers 5.23 or newer, which has Step-3.5 as models.step3p7, to compare "
            f"with; found {package_version('transformers')} ({error}). Install it: {_INSTALL}"
        ) from error


def package_version(package: str) -> str:
    """The name and version of an installed package, or that there is none."""
    from importlib import metadata  # takes longer to import than all else here

    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"
