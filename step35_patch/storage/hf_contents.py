"""Which stored tensors the published ones are read from, and all that does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from step35_patch.config.model import Step35Config
from step35_patch.config.quantization import quantization_of
from step35_patch.storage.fp8 import scale_shape
from step35_patch.storage.shards import Shards, Stored
from step35_patch.tensors.published import TensorInfo, published_tensors, router_biases
from step35_patch.tensors.spelling import (
    VISION,
    Place,
    is_of_transformers,
    published_place,
    transformers_place,
)

_FP8 = "F8_E4M3"
_ROUNDED = ("BF16", "F16")
# Quantised weights are stored as integers, or as numbers of one byte and less.
_PLAIN = ("BF16", "F16", "F32", "F64")
_SCALES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a folder may have otherwise than published; the names say what is lost by it.

    Attributes:
        rounded_router_bias: Routers' biases that were rounded to bf16 or fp16 when they were saved.
        dequantize_fp8: Weights in FP8 with block scales, which are dequantised: see `storage.fp8`.
    """

    rounded_router_bias: bool = False
    dequantize_fp8: bool = False


PUBLISHED = Accepted()


@dataclass(frozen=True, slots=True)
class Source:
    """What a published tensor is read from.

    Attributes:
        info: The published tensor.
        place: Where it stands.
        stored: The stored tensor there.
        scales: Of an FP8 weight; else None.
    """

    info: TensorInfo
    place: Place
    stored: Stored
    scales: Stored | None

    @property
    def width(self) -> int:
        """Elements of a row; a vector is a column."""
        return self.info.shape[-1] if len(self.info.shape) > 1 else 1

    def stored_rows(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Where rows `first` to `last` stand, counted through all matrices on both sides.

        Yields:
            The first row of the stored tensor, and the one behind the last.
        """
        if self.place.shape == self.info.shape:
            yield first, last
            return
        own, of_stored = self.info.shape[-2], self.place.shape[-2]
        for matrix in range(first // own, -(-last // own)):
            moved = matrix * (of_stored - own) + self.place.first_row
            yield max(first, matrix * own) + moved, min(last, (matrix + 1) * own) + moved


class Contents:
    """A folder's stored tensors held against a config's published ones.

    Args:
        shards: The folder's.
        config: Of the model.
        torch_dtype: Of the tensors; the config's own if None.
        mtp_layers: How many of the config's MTP layers are wanted; all if None.
        accept: What may be otherwise.

    Attributes:
        sources: What each tensor that is wanted is read from, by published name.
        fp8_block: Rows and columns of a block of FP8 weights that are dequantised; else None.
        problems: What does not fit, each in a line.
        notices: What the user should know, each in a line.
    """

    def __init__(
        self,
        shards: Shards,
        config: Step35Config,
        *,
        torch_dtype: str | None,
        mtp_layers: int | None,
        accept: Accepted,
    ) -> None:
        self.sources: dict[str, Source] = {}
        self.fp8_block: tuple[int, int] | None = None
        self.problems: list[str] = []
        self.notices: list[str] = []
        self._stored, self._accept = shards.tensors, accept
        self._router_biases = router_biases(config)
        self._refuse_quantized(shards.path)
        if self.problems:
            return
        place = transformers_place if is_of_transformers(self._stored) else published_place
        places = {info: place(info) for info in published_tensors(config, torch_dtype)}
        wanted = published_tensors(config, torch_dtype, mtp_layers=mtp_layers)
        decoder = set(published_tensors(config, torch_dtype, mtp_layers=0))
        mtp = [info for info in wanted if info not in decoder]
        if mtp and not any(places[info].name in self._stored for info in mtp):
            self._refuse_without_mtp(config)
            wanted = tuple(info for info in wanted if info in decoder)
        for info in wanted:
            self._find(info, places[info])
        self._refuse_rounded()
        self._refuse_others({place.name for place in places.values()})

    def _refuse_quantized(self, folder: Path) -> None:
        """Note how the weights are quantised; once, if they can't be read."""
        kinds = Counter(found.dtype for found in self._stored.values())
        quantized = [kind for kind in kinds if kind not in _PLAIN]
        if not quantized:
            return
        found = quantization_of(folder)
        is_fp8 = quantized == [_FP8] and found is not None and found.block is not None
        if is_fp8 and found is not None and self._accept.dequantize_fp8:
            self.fp8_block = found.block
            self.notices.append(f"{kinds[_FP8]} tensors are dequantised: {found}")
            return
        counts = ", ".join(f"{kinds[kind]} tensors of {kind}" for kind in quantized)
        way_out = "take the folder of the model in bf16"
        if is_fp8:
            way_out += (
                "; or dequantise this one with --dequantize-fp8 (dequantize_fp8=True), of convert "
                "to-megatron, verify and load_hf_weights: what rounding to FP8 lost stays lost"
            )
        elif self._accept.dequantize_fp8:
            way_out += (
                "; only FP8 can be dequantised, with quant_method fp8 and a weight_block_size in "
                "quantization_config"
            )
        self.problems.append(
            f"expected plain weights, found quantised ones: {counts}; "
            f"{found or 'by which method, no file says'}; {way_out}"
        )

    def _refuse_without_mtp(self, config: Step35Config) -> None:
        layers = config.num_nextn_predict_layers
        self.problems.append(
            f"expected the {layers} MTP layers of the config (num_nextn_predict_layers), found no "
            "tensor of them; transformers does not save them. To do without: --without-mtp "
            "(without_mtp=True) of convert to-megatron, --no-mtp of verify, and a model that is "
            "built with --mtp-num-layers 0 (mtp_num_layers=None) for load_hf_weights"
        )

    def _find(self, info: TensorInfo, place: Place) -> None:
        if (stored := self._stored.get(place.name)) is None:
            self.problems.append(f"{place.name}: missing")
            return
        if stored.shape != place.shape:
            self.problems.append(
                f"{place.name}: shape {stored.shape} in {stored.file}, expected {place.shape}"
            )
        scales = None
        if stored.dtype == _FP8 and self.fp8_block and len(info.shape) > 1:
            scales = self._scales(stored, self.fp8_block)
        elif stored.dtype != info.dtype and not self._is_rounded(info, stored):
            self.problems.append(
                f"{place.name}: dtype {stored.dtype} in {stored.file}, expected {info.dtype}"
                " (the config's torch_dtype; router_bias is F32)"
            )
        self.sources[info.name] = Source(info, place, stored, scales)

    def _scales(self, stored: Stored, block: tuple[int, int]) -> Stored | None:
        name = _scales_name(stored.name)
        if (scales := self._stored.get(name)) is None:
            self.problems.append(f"{name}: missing, the scales of an FP8 weight")
            return None
        shape = scale_shape(stored.shape, block)
        if scales.shape != shape:
            self.problems.append(f"{name}: shape {scales.shape} in {scales.file}, expected {shape}")
        if scales.dtype not in _SCALES:
            expected = " or ".join(_SCALES)
            self.problems.append(
                f"{name}: dtype {scales.dtype} in {scales.file}, expected {expected}"
            )
        return scales

    def _refuse_rounded(self) -> None:
        rounded = [
            source.stored
            for source in self.sources.values()
            if self._is_rounded(source.info, source.stored)
        ]
        if not rounded:
            return
        first = rounded[0]
        what = f"{len(rounded)} router biases were rounded to {first.dtype} when they were saved"
        if self._accept.rounded_router_bias:
            self.notices.append(f"{what}, and are taken as they are")
            return
        self.problems.append(
            f"{first.name}: dtype {first.dtype} in {first.file}, expected F32; {what}, by which "
            "tokens go to other experts. Copy them from the published folder, or take them with "
            "--accept-rounded-router-bias (accept_rounded_router_bias=True)"
        )

    def _is_rounded(self, info: TensorInfo, stored: Stored) -> bool:
        return info.name in self._router_biases and stored.dtype in _ROUNDED

    def _refuse_others(self, known: set[str]) -> None:
        fp8 = {name for name in known & self._stored.keys() if self._stored[name].dtype == _FP8}
        known |= {_scales_name(name) for name in fp8}  # of MTP layers that are not read, too
        others = [found for name, found in self._stored.items() if name not in known]
        vision = [found for found in others if found.name.startswith(VISION)]
        if vision:
            self.notices.append(f"{len(vision)} tensors of a vision model are left alone")
        self.problems += [
            f"{found.name}: unexpected, in {found.file}" for found in others if found not in vision
        ]


def _scales_name(weight: str) -> str:
    return f"{weight}_scale_inv"
