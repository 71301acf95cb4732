"""`step35-patch verify`: transformers' Step-3.5 and this package's on the same tokens, layer by layer.

Each side carries its own hidden states through the model, which shows how far the two end up apart.
Besides, each part of ours (embedding, layer, output matrix) is given what the reference's part was
given, which shows where the two part: a wrong layer is named, and not all layers behind it.

Weights are read when the module that uses them is called and dropped right after, on both sides, so
that a model of any size fits: at most `largest_weights` bytes of them at a time, twice that while
they are read and converted, and activations that grow with the number of tokens. The published
model in float32 needs 0.37 GB of weights at a time, and about 2 GB altogether at 1024 tokens.

This module imports neither torch nor Megatron-Core; `step35_patch.verify.by_layer` does the work.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.tensors.published import layer_tensors

if TYPE_CHECKING:
    import torch

    from step35_patch.config.model import Step35Config

# Tokens behind the window, at least: enough for a few blocks of a tiny model's window.
_BEYOND_WINDOW = 64
# Rows of the embedding and the output matrices that are read at a time.
VOCABULARY_ROWS = 4096
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_INSTALL = 'pip install "transformers>=5.23"'


class Weights(Protocol):
    """Where weights come from, by their published names; `step35_patch.storage.hf_folder.HfFolder` is one."""

    def get(self, name: str, *index: int | slice) -> torch.Tensor:
        """The tensor, or the part of it that `index` selects."""


class ReferenceMissingError(ImportError):
    """transformers, which is what is compared with, is missing or too old."""


@dataclass(frozen=True, slots=True)
class Part:
    """How far the two sides are apart after one part of the model.

    Attributes:
        name: "embedding", "layer 3", or the published name of an output matrix.
        kind: what a layer is made of ("sliding, MoE"), or what stands before the output matrix.
        difference: the part's own difference, given the reference's input: at each position the
            largest difference over the largest change that the reference's part makes (over its
            largest output, for parts that are not added to what went in); the largest of these.
            What rounding a layer's two additions to its input can make is not counted.
        end_to_end: given its side's own input, the largest difference over the largest output.
        differing: positions whose own difference is over the tolerance, near ties left out.
        near_ties: positions at which the last chosen expert and the next one score so alike that
            rounding can decide between them.
        positions: all of them.
    """

    name: str
    kind: str
    difference: float
    end_to_end: float
    differing: int
    near_ties: int
    positions: int


@dataclass(frozen=True, slots=True)
class LogitsAgreement:
    """How alike the logits of one output matrix are, each side having computed all by itself.

    Attributes:
        name: the published name of the output matrix.
        cosine_min, cosine_mean: of the two sides' logits at a position, over the positions.
        largest: the largest difference of two logits.
        relative: the same, over the reference's largest logit.
        top1: share of the positions at which both have the largest logit at the same token.
    """

    name: str
    cosine_min: float
    cosine_mean: float
    largest: float
    relative: float
    top1: float


@dataclass(frozen=True, slots=True)
class Report:
    """What `compare` found.

    Attributes:
        parts: all parts, in the order of computation.
        logits: the model's, then each MTP layer's.
        tolerance: the own difference of a part up to which it is said to agree.
        suspects: tensors of the first part that differs, as far as their values are not the same on
            both sides; none if both read the same folder.
    """

    parts: tuple[Part, ...]
    logits: tuple[LogitsAgreement, ...]
    tolerance: float
    suspects: tuple[str, ...]

    @property
    def first_difference(self) -> Part | None:
        """The first part that differs, given the reference's input."""
        return next((part for part in self.parts if part.differing), None)

    @property
    def agrees(self) -> bool:
        """Whether no part differs."""
        return self.first_difference is None


def compare(
    hf_dir: str | os.PathLike,
    *,
    source: Weights | None = None,
    length: int | None = None,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    on_part: Callable[[Part], None] | None = None,
) -> Report:
    """Compare transformers' Step-3.5 with this package's on random tokens, on the CPU.

    In float32 a part agrees up to 1e-4 of its own change, in bfloat16 up to 5e-2. A position at
    which two experts score nearly alike (1e-5 and 2e-2) is no difference of its layer's, but changes
    what follows: in a model with hundreds of experts, end to end logits of a few positions may
    differ in the third digit though every layer agrees.

    Megatron-Core runs on the CPU by `step35_patch.cpu.install`, which lasts for the process.
    torch.distributed and Megatron-Core's groups are initialised for the call unless they are.

    Args:
        hf_dir: a folder in the published layout; the reference's weights, and config.json.
        source: our side's weights; those of `hf_dir` by default.
        length: tokens of each sequence; more than the sliding window. See `sequence_length`.
        batch: sequences.
        seed: of the tokens. The config's pad_token_id is not among them.
        dtype: what both sides compute in, torch.float32 (default) or torch.bfloat16; the router
            computes in float32.
        mtp: with the MTP layers.
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
    _check_reference()
    from step35_patch.verify import by_layer as compare_layers

    return compare_layers.compare_layers(
        hf_dir, config, source, (batch, length), seed, dtype, mtp, on_part or (lambda part: None)
    )


def sequence_length(config: Step35Config, length: int | None = None) -> int:
    """The length to compare at: `length` if it is beyond the window, else an error.

    None means twice the sliding window, or 64 tokens more than it if that is longer, but no more
    than max_position_embeddings.

    Raises:
        ValueError: the length is not beyond the window, so that it could not show an error in it.
    """
    window = config.sliding_window if _is_sliding(config) else 1
    if length is None:
        length = max(2 * window, window + _BEYOND_WINDOW)
        length = min(length, config.max_position_embeddings)
    if length <= window:
        raise ValueError(
            f"length: expected more than the sliding window's {window} tokens, found {length}: a "
            "shorter sequence cannot show an error in the window"
        )
    return length


def _is_sliding(config: Step35Config) -> bool:
    return any(plan.window_size is not None for plan in config.layers)


def _check_reference() -> None:
    try:
        importlib.import_module("transformers.models.step3p7")
    except ImportError as error:
        raise ReferenceMissingError(
            f"expected transformers 5.23 or newer, which has Step-3.5 as models.step3p7, to compare "
            f"with; found {_version('transformers')} ({error}). Install it: {_INSTALL}"
        ) from error


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def layer_kind(plan: LayerPlan) -> str:
    """What a layer is made of, for people: "sliding, MoE"; MTP layers are numbered by `Part.name`."""
    attention = "full" if plan.window_size is None else "sliding"
    return f"{attention}, {'MoE' if plan.is_moe else 'dense'}{', MTP' if plan.is_mtp else ''}"


def largest_weights(config: Step35Config, dtype: str) -> int:
    """Bytes of the most weights that one side has in memory at a time.

    They are those of one module: q, k, v and the gate; gate and up of an MLP or of one expert; or
    a block of the vocabulary.

    Args:
        dtype: what is computed in, "float32" or "bfloat16".
    """
    together = {f"{letter}_proj" for letter in "qkvg"} | {"gate_proj", "up_proj"}
    elements: Counter[tuple[str, str]] = Counter()
    for plan in config.layers:
        for tensor in layer_tensors(config, plan):
            if tensor.name.endswith("shared_head.output.weight"):
                continue  # read by blocks
            module, _, name = tensor.name.removesuffix(".weight").rpartition(".")
            # The last two dimensions are those of one expert.
            elements[module, "" if name in together else name] += math.prod(tensor.shape[-2:])
    rows = min(VOCABULARY_ROWS, config.vocab_size)
    return max(rows * config.hidden_size, *elements.values()) * _DTYPE_BYTES[dtype]


# --- The command --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch verify`."""
    parser.add_argument("hf_dir", metavar="HF_DIR", help="a folder in the published layout")
    parser.add_argument(
        "--against",
        choices=["transformers"],
        default="transformers",
        help="what to compare with (%(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="a Megatron checkpoint, whose weights ours then are; HF_DIR's by default",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens, more than the sliding window (default: twice that)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=list(_DTYPE_BYTES),
        default="float32",
        help="what both compute in (%(default)s); bfloat16 shows coarse errors only",
    )
    parser.add_argument(
        "--no-mtp",
        dest="mtp",
        action="store_false",
        help="leave the MTP layers out, such as those that a checkpoint was trained without",
    )


def run(options: argparse.Namespace) -> int:
    """Compare, and print what is found as it comes.

    Args:
        options: what a parser with `add_arguments` parsed.

    Returns:
        The exit status: 0 if every part agrees, 1 if one differs or nothing could be compared.
    """
    # Before torch looks for a device: the comparison is one of CPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _return_freed_memory()
    try:
        report = _run(options)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    _print_summary(report)
    return 0 if report.agrees else 1


def _return_freed_memory() -> None:
    """Let glibc give blocks of a MiB and more back to the system when they are freed.

    It would come to keep those of up to 32 MiB, as an expert's weights are, and what little stays
    of each call between them would keep it from using them again: some GB for each MoE layer.
    """
    m_mmap_threshold = -3  # malloc.h
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


def _run(options: argparse.Namespace) -> Report:
    from step35_patch.config.model import Step35Config

    config = Step35Config.from_pretrained(options.hf_dir)
    length = sequence_length(config, options.length)
    _check_reference()

    import torch

    source = None
    if options.checkpoint:
        source = _checkpoint_source(options.checkpoint, config, options.mtp)
    decoder, mtp = config.num_hidden_layers, config.num_nextn_predict_layers * options.mtp
    megabytes = largest_weights(config, options.dtype) / 1e6
    print(
        f"{_version('transformers')} and {_version('megatron-core')}, {options.dtype} on the CPU\n"
        f"reference's weights: {options.hf_dir}\n"
        f"ours:                {options.checkpoint or options.hf_dir}\n"
        f"{decoder} decoder layers and {mtp} MTP layers on {length} random tokens "
        f"(seed {options.seed})"
        + (f", sliding window {config.sliding_window}" if _is_sliding(config) else "")
        + f"\nweights in memory: at most {megabytes:.3g} MB at a time, twice that while they are read",
        flush=True,
    )
    return compare(
        options.hf_dir,
        source=source,
        length=length,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        mtp=options.mtp,
        on_part=_print_part,
    )


def _checkpoint_source(path: str, config: Step35Config, mtp: bool) -> Weights:
    """The weights of a Megatron checkpoint under their published names.

    Args:
        mtp: with the MTP layers.

    Raises:
        CheckpointError: it is not a checkpoint of the config's model.
        DriftedGateError: it has gates that are no g_proj.
        ValueError: it lacks MTP layers that were asked for.
    """
    from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint

    checkpoint = MegatronCheckpoint(path, config)
    if mtp and checkpoint.absent:
        raise ValueError(
            f"{path}: expected {config.num_nextn_predict_layers} MTP layers as in config.json, found "
            f"no {checkpoint.absent[0]}; leave the MTP layers out with --no-mtp"
        )
    checkpoint.refuse_drifted_gates()
    return checkpoint


def _print_part(part: Part) -> None:
    if part.name == "embedding":  # the first one: Megatron-Core has had its say by now
        print(
            f"\n{'':<54}{'own':>9}{'end to':>10}{'positions':>13}{'near':>6}"
            f"\n{'part':<54}{'diff.':>9}{'end':>10}{'that differ':>13}{'ties':>6}"
        )
    title = f"{part.name:<10} {part.kind}" if part.kind else part.name
    print(
        f"{title:<54}{part.difference:>9.1e}{part.end_to_end:>10.1e}"
        f"{part.differing:>13}{part.near_ties:>6}",
        flush=True,
    )


def _print_summary(report: Report) -> None:
    for logits in report.logits:
        print(
            f"\nlogits of {logits.name}\n"
            f"  cosine              {logits.cosine_min:.9f} at least, "
            f"{logits.cosine_mean:.9f} on average\n"
            f"  largest difference  {logits.largest:.3g}, "
            f"{logits.relative:.3g} of the largest logit\n"
            f"  top-1 agreement     {logits.top1:.2%}"
        )
    part = report.first_difference
    print(f"\nfirst layer that differs: {'none' if part is None else part.name}")
    if part is None:
        ties = sum(other.near_ties for other in report.parts)
        print(
            f"AGREE: no part differs by more than {report.tolerance:g} of what it does"
            + (f", {ties} near ties of experts left out" if ties else "")
        )
        return
    print(
        f"DIFFER: {part.name} does, by {part.difference:.3g} of what it does (tolerance "
        f"{report.tolerance:g}), at {part.differing} of {part.positions} positions"
    )
    if report.suspects:
        print("Its tensors with other values than HF_DIR's:")
        print("\n".join(f"  {name}" for name in report.suspects))
