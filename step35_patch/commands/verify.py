"""`step35-patch verify`: the two implementations side by side, printed layer by layer."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from typing import TYPE_CHECKING

from step35_patch.commands.acceptance import add_acceptance
from step35_patch.commands.upstream_notices import without_upstream_notices
from step35_patch.tensors.published import Weights
from step35_patch.verify.api import (
    check_reference,
    compare,
    largest_weights,
    package_version,
    sequence_length,
    sliding_window,
)
from step35_patch.verify.pieces import DTYPE_BYTES
from step35_patch.verify.report import Part, Report

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config


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
        choices=list(DTYPE_BYTES),
        default="float32",
        help="what both compute in (%(default)s); bfloat16 shows coarse errors only",
    )
    parser.add_argument(
        "--no-mtp",
        dest="mtp",
        action="store_false",
        help="leave the MTP layers out, such as those that a checkpoint was trained without",
    )
    add_acceptance(parser)
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="instead: train one iteration under a parallel layout and in one process, on the CPU "
        "with HF_DIR's layers in a small size, and compare every gradient",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --gradients (default: what LAYOUT needs)"
    )
    parser.add_argument(
        "layout",
        metavar="LAYOUT",
        nargs="*",
        help="with --gradients, behind --: Megatron's arguments of the layout, and others that "
        "both runs get",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare, and print what is found as it comes.

    Args:
        options: what a parser with `add_arguments` parsed.

    Returns:
        The exit status: 0 if every part agrees, 1 if one differs, 2 if nothing could be compared.
    """
    if options.gradients:
        from step35_patch.commands import gradients

        return gradients.run(options.hf_dir, options.layout, options.processes)
    if options.layout or options.processes:
        print("LAYOUT and --processes: expected none without --gradients", file=sys.stderr)
        return 2
    # Before torch looks for a device: the comparison is one of CPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _return_freed_memory()
    try:
        with without_upstream_notices():
            report = _compare(options)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    _print_summary(report)
    return 0 if report.agrees else 1


def _return_freed_memory() -> None:
    """Let glibc give blocks of a MiB and more back to the system when they are freed.

    It would come to keep those of up to 32 MiB, as an expert's weights are, and what little stays
    of each call between them would keep it from using them again: some GB for each MoE layer.

    It is a setting of the whole process, and so the command's to make: a program that calls
    `compare` may have chosen its own.
    """
    m_mmap_threshold = -3  # malloc.h
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)


def _compare(options: argparse.Namespace) -> Report:
    from step35_patch.config.model import Step35Config

    config = Step35Config.from_pretrained(options.hf_dir)
    length = sequence_length(config, options.length)
    check_reference()

    import torch

    source = None
    if options.checkpoint:
        source = _checkpoint_source(options.checkpoint, config, options.mtp)
    _print_head(options, config, length)
    return compare(
        options.hf_dir,
        source=source,
        length=length,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        mtp=options.mtp,
        accept_rounded_router_bias=options.accept_rounded_router_bias,
        dequantize_fp8=options.dequantize_fp8,
        on_part=_print_part,
    )


def _checkpoint_source(path: str, config: Step35Config, mtp: bool) -> Weights:
    """The weights of a Megatron checkpoint under their published names.

    Args:
        path: what Megatron's --load takes, or the folder of one iteration.
        config: of its model.
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
            f"{path}: expected {config.num_nextn_predict_layers} MTP layers as in config.json, "
            f"found no {checkpoint.absent[0]}; leave the MTP layers out with --no-mtp"
        )
    checkpoint.refuse_drifted_gates()
    return checkpoint


def _print_head(options: argparse.Namespace, config: Step35Config, length: int) -> None:
    window = sliding_window(config)
    mtp_layers = config.num_nextn_predict_layers if options.mtp else 0
    megabytes = largest_weights(config, options.dtype) / 1e6
    print(
        f"{package_version('transformers')} and {package_version('megatron-core')}, "
        f"{options.dtype} on the CPU\n"
        f"reference's weights: {options.hf_dir}\n"
        f"ours:                {options.checkpoint or options.hf_dir}\n"
        f"{config.num_hidden_layers} decoder layers and {mtp_layers} MTP layers on {length} random "
        f"tokens (seed {options.seed})"
        + ("" if window is None else f", sliding window {window}")
        + f"\nweights in memory: at most {megabytes:.3g} MB at a time, twice that while they are "
        "read",
        flush=True,
    )


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
