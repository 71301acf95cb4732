"""`step35-patch convert`: the arguments of both directions, and how a run ends."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from step35_patch.commands.acceptance import add_acceptance
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.published import SAFETENSORS_DTYPES

if TYPE_CHECKING:
    from step35_patch.convert import Options

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the two subcommands."""
    directions = parser.add_subparsers(title="directions", metavar="DIRECTION", required=True)
    to_megatron = directions.add_parser(
        "to-megatron",
        help="write what pretrain_gpt.py --load takes",
        description="Convert a folder in the published layout to a torch_dist checkpoint that "
        "Megatron-Core loads under any parallel layout, with either transformer implementation.",
        epilog=parser.epilog,
    )
    to_megatron.add_argument("hf_dir", metavar="HF_DIR", help="folder with config.json and weights")
    to_megatron.add_argument("out", metavar="OUT", help="folder to be made")
    to_megatron.add_argument(
        "--gate-layout",
        choices=GATE_LAYOUTS,
        default=GATE_LAYOUTS[0],
        help="as the run that loads it has (default: %(default)s)",
    )
    to_megatron.add_argument(
        "--without-mtp",
        action="store_true",
        help="leave the MTP layers out, which HF_DIR then need not have",
    )
    add_acceptance(to_megatron)
    to_megatron.set_defaults(run=_to_megatron)
    to_hf = directions.add_parser(
        "to-hf",
        help="write what vLLM, SGLang and transformers load",
        description="Convert a torch_dist checkpoint of Megatron's, of any parallel layout, to the "
        "published layout. Optimizer state is not read.",
        epilog=parser.epilog,
    )
    to_hf.add_argument(
        "checkpoint", metavar="CKPT", help="what --load takes, or the folder of one iteration"
    )
    to_hf.add_argument("out", metavar="OUT", help="folder to be made")
    to_hf.add_argument(
        "--hf-dir",
        required=True,
        help="folder with the model's config.json; what else is in it (tokenizer, generation "
        "config) is copied along, weights are not",
    )
    to_hf.add_argument(
        "--average-gate",
        action="store_true",
        help="take the mean of an expanded gate's rows that have drifted apart",
    )
    to_hf.add_argument(
        "--mtp-from",
        metavar="HF_DIR",
        help="copy the MTP layers that the checkpoint lacks from this folder",
    )
    to_hf.add_argument(
        "--without-mtp",
        action="store_true",
        help="leave the MTP layers out: config.json has num_nextn_predict_layers 0",
    )
    to_hf.add_argument(
        "--accept-changed",
        nargs="+",
        metavar="FIELD",
        default=[],
        help="fields in which --hf-dir's config.json may differ from the checkpoint's config, such "
        "as rope_theta; what is written has --hf-dir's",
    )
    to_hf.set_defaults(run=_to_hf)
    for command in (to_megatron, to_hf):
        _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=list(SAFETENSORS_DTYPES),
        help="convert the weights (default: leave them as they are)",
    )
    command.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="of a written file, such as 500MB (default: 5GB to-hf, 2GB to-megatron)",
    )
    command.add_argument(
        "--workers", type=int, default=2, metavar="N", help="files at a time (default: %(default)s)"
    )
    command.add_argument(
        "--check", action="store_true", help="read the output again and compare every tensor"
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be done")
    command.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    command.add_argument(
        "--allow-nonfinite", action="store_true", help="convert weights that are NaN or Inf too"
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, found {text!r}")
    return size


def _options(options: argparse.Namespace) -> Options:
    import torch

    from step35_patch.convert import Options

    return Options(
        dtype=options.dtype and getattr(torch, options.dtype),
        file_bytes=options.max_shard_size,
        workers=options.workers,
        overwrite=options.overwrite,
        check=options.check,
        allow_nonfinite=options.allow_nonfinite,
        dry_run=options.dry_run,
    )


def _to_megatron(options: argparse.Namespace) -> int:
    def convert() -> None:
        from step35_patch.convert import convert_to_megatron

        convert_to_megatron(
            options.hf_dir,
            options.out,
            gate_layout=options.gate_layout,
            without_mtp=options.without_mtp,
            accept_rounded_router_bias=options.accept_rounded_router_bias,
            dequantize_fp8=options.dequantize_fp8,
            options=_options(options),
        )

    return _run(convert)


def _to_hf(options: argparse.Namespace) -> int:
    def convert() -> None:
        from step35_patch.convert import convert_to_hf

        convert_to_hf(
            options.checkpoint,
            options.out,
            hf_dir=options.hf_dir,
            average_gate=options.average_gate,
            mtp_from=options.mtp_from,
            without_mtp=options.without_mtp,
            accept_changed=options.accept_changed,
            options=_options(options),
        )

    return _run(convert)


def _run(convert: Callable[[], None]) -> int:
    """0; 1 with the reason if it can't be done; 130 if it was interrupted."""
    interrupted = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    # SIGTERM is how batch systems end a job.
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        from step35_patch.convert import ConversionError
        from step35_patch.storage.errors import OutputBusyError

        if interrupted:  # what torch imports may have swallowed it
            raise KeyboardInterrupt
        try:
            convert()
        # CheckpointError, DriftedGateError and Step35ConfigError are ValueErrors.
        except (ValueError, OSError, ConversionError, OutputBusyError) as error:
            with contextlib.suppress(BrokenPipeError):
                print(error, file=sys.stderr, flush=True)
            return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    return 0
