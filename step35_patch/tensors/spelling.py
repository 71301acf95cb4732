"""Where the published tensors stand in a folder that spells them as transformers' modules do.

transformers turns its names into the published ones when it saves, unless it is told not to
(`save_pretrained(..., save_original_format=False)`). Its own names have the language model below
`model.language_model`, and the gate and up projections of the routed experts in one tensor
[experts, gate rows and up rows, columns]. Standard library only.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from step35_patch.tensors.published import TensorInfo
from step35_patch.tensors.table import EMBEDDING

_MODEL, _LANGUAGE_MODEL = "model.", "model.language_model."
_PARTS = {
    ".moe.gate.weight": ".mlp.gate.weight",
    ".moe.router_bias": ".mlp.gate.e_score_correction_bias",
    ".moe.down_proj.weight": ".mlp.experts.down_proj",
    ".share_expert.": ".mlp.shared_experts.",
}
# In their order in the fused tensor.
_GATE_UP = (".moe.gate_proj.weight", ".moe.up_proj.weight")
_FUSED = ".mlp.experts.gate_up_proj"

# What a multimodal model has besides, in the published names and in transformers'.
VISION = (
    *("vision_model.", "vit_large_projector."),
    *("model.vision_model.", "model.multi_modal_projector."),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a published tensor stands.

    Attributes:
        name: Of the stored tensor.
        shape: Of the stored tensor.
        first_row: The first row that is the published one's, in each matrix of the stored.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int = 0


def published_place(info: TensorInfo) -> Place:
    """Where the published layout has a tensor."""
    return Place(info.name, info.shape)


def transformers_place(info: TensorInfo) -> Place:
    """Where a folder has a tensor if `is_of_transformers` says so."""
    name = info.name
    if name.startswith(_MODEL):
        name = _LANGUAGE_MODEL + name.removeprefix(_MODEL)
    for number, suffix in enumerate(_GATE_UP):
        if name.endswith(suffix):
            experts, rows, columns = info.shape
            fused = (experts, len(_GATE_UP) * rows, columns)
            return Place(name.removesuffix(suffix) + _FUSED, fused, number * rows)
    for published, own in _PARTS.items():
        name = name.replace(published, own)
    return Place(name, info.shape)


def is_of_transformers(stored: Container[str]) -> bool:
    """Whether stored tensors have the names of transformers' modules."""
    return _LANGUAGE_MODEL + EMBEDDING.removeprefix(_MODEL) in stored


def expert_name(published: str, expert: int) -> str:
    """What vLLM's Step-3.5 reads one routed expert's part of a published tensor by.

    Args:
        published: The name of the tensor with all experts of a layer.
        expert: Its number in the whole model.
    """
    return published.replace(".moe.", f".moe.experts.{expert}.")
