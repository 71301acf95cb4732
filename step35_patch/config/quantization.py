"""What a folder says of how its weights are quantised, beside the fields of the model.

Programs that quantise write `quantization_config` into config.json, or a file of their own.
Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Fields of a config by which programs take weights for quantised, at whatever level they stand.
QUANTIZATION_FIELDS = (
    "quantization_config",
    "compression_config",  # compressed-tensors' older name
    "quantization",  # MLX writes both
    "_pre_quantization_dtype",
)
# Where it may stand: the file, and the field in it.
_PLACES = (
    ("config.json", "quantization_config"),
    ("config.json", "compression_config"),
    ("hf_quant_config.json", "quantization"),
    ("quantize_config.json", None),
    ("quant_config.json", None),
)
_METHODS = ("quant_method", "quant_algo", "format")
_BITS = ("bits", "num_bits", "w_bit")
_FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a folder's weights are quantised, by its own account.

    Attributes:
        place: Where that stands.
        method: Such as `fp8`, `gptq`, `compressed-tensors`.
        bits: Of a weight; None if it is not said.
        block: Rows and columns of a block with one scale, of `fp8` with block scales; else None.
    """

    place: str
    method: str
    bits: int | None
    block: tuple[int, int] | None

    def __str__(self) -> str:
        bits = "" if self.bits is None else f", {self.bits} bits"
        block = "" if self.block is None else f", blocks of {self.block[0]} x {self.block[1]}"
        return f"quant_method {self.method}{bits}{block} ({self.place})"


def quantization_of(folder: Path) -> Quantization | None:
    """What a folder says of it; None if it says nothing that can be read.

    Args:
        folder: With a config.json; of a multimodal one `text_config` is looked at too.
    """
    for file, field in _PLACES:
        try:
            document = json.loads((folder / file).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        objects = [document, document.get("text_config")] if isinstance(document, dict) else []
        for found in objects:
            stated = found.get(field) if isinstance(found, dict) and field else found
            if isinstance(stated, dict):
                place = file if field is None else f"{field} in {file}"
                return _read(stated, place)
    return None


def _read(stated: Mapping[str, Any], place: str) -> Quantization:
    method = next((f"{stated[name]}" for name in _METHODS if stated.get(name)), "not said")
    bits = next((v for n, v in _entries(stated) if n in _BITS and type(v) is int), None)
    if bits is None:
        bits = next((b for b in (4, 8) if stated.get(f"load_in_{b}bit") is True), None)
    block = None
    if method == _FP8:
        bits = bits or 8
        sizes = stated.get("weight_block_size")
        if isinstance(sizes, list) and len(sizes) == 2 and all(_is_size(n) for n in sizes):
            block = (sizes[0], sizes[1])
    return Quantization(place, method, bits, block)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All names and values of an object, and of the objects in it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name, inner
            yield from _entries(inner)
