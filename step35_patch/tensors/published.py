"""The tensors of a published Step-3.5 checkpoint: names, shapes and dtypes, from a config alone.

They are those of `step35_patch.tensors.table`, in the published checkpoint's order. Nothing but the
standard library is used, so that the list can be had where there is no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.table import Row, layer_rows, layers_with, tensor_table

if TYPE_CHECKING:
    from torch import Tensor

    from step35_patch.config.model import Step35Config

# safetensors' names of the dtypes, and the bytes of one element.
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the published checkpoint.
        shape: Its sizes; a weight of a linear layer is [out, in].
        dtype: safetensors' name of its dtype: `"BF16"`, `"F16"` or `"F32"`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes its numbers take in a file, without the header."""
        return self.num_elements * _ELEMENT_BYTES[self.dtype]


class Weights(Protocol):
    """Where weights are read from by their published names: a folder, or a Megatron checkpoint."""

    def get(self, name: str, *index: int | slice) -> Tensor:
        """The tensor, or the part of it that `index` selects."""


def published_tensors(
    config: Step35Config, torch_dtype: str | None = None, *, mtp_layers: int | None = None
) -> tuple[TensorInfo, ...]:
    """Every tensor of the published checkpoint of `config`: embedding, layers, norm and head.

    All have one dtype but the router's bias, which is fp32.

    Args:
        config: The model.
        torch_dtype: Of the tensors, as in `SAFETENSORS_DTYPES`; the config's own if None.
        mtp_layers: How many of the config's MTP layers, the first ones; all if None.
    """
    first, *outside = (r for r in tensor_table(config, GATE_LAYOUTS[0]) if r.layer is None)
    torch_dtype = torch_dtype or config.torch_dtype
    return (
        *_in_order([first], torch_dtype),
        *(
            tensor
            for plan in layers_with(config, mtp_layers)
            for tensor in layer_tensors(config, plan, torch_dtype)
        ),
        *_in_order(outside, torch_dtype),
    )


def layer_tensors(
    config: Step35Config, plan: LayerPlan, torch_dtype: str | None = None
) -> Iterator[TensorInfo]:
    """The tensors of one layer; those of an MTP layer include the MTP module around it.

    Args:
        config: The model.
        plan: The layer.
        torch_dtype: As for `published_tensors`.
    """
    # Either layout of the gate is made of the same tensors.
    rows = layer_rows(config, plan, GATE_LAYOUTS[0])
    return _in_order(rows, torch_dtype or config.torch_dtype)


def router_biases(config: Step35Config) -> frozenset[str]:
    """The names of the tensors that are fp32 whatever dtype the model has."""
    rows = tensor_table(config, GATE_LAYOUTS[0])
    return frozenset(tensor.name for row in rows for tensor in row.published if tensor.is_fp32)


def _in_order(rows: Iterable[Row], torch_dtype: str) -> Iterator[TensorInfo]:
    tensors = sorted((tensor for row in rows for tensor in row.published), key=lambda t: t.place)
    for tensor in tensors:
        dtype = "F32" if tensor.is_fp32 else SAFETENSORS_DTYPES[torch_dtype]
        yield TensorInfo(tensor.name, tensor.shape, dtype)
