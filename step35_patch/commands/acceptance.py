"""Options of commands that read a folder of weights: what it may have otherwise than published."""

from __future__ import annotations

import argparse


def add_acceptance(parser: argparse.ArgumentParser) -> None:
    """Add `--accept-rounded-router-bias` and `--dequantize-fp8`."""
    parser.add_argument(
        "--accept-rounded-router-bias",
        action="store_true",
        help="take routers' biases that were rounded to bf16 when HF_DIR was saved, as "
        "transformers does",
    )
    parser.add_argument(
        "--dequantize-fp8",
        action="store_true",
        help="take weights in FP8 with block scales, and compute what they stand for; what "
        "rounding to FP8 lost stays lost",
    )
