"""Between the published q, k, v and g projections and Megatron-Core's one linear_qkv.

All functions work on whole (not tensor-parallel) weights. Rows of linear_qkv stand by query group,
[q (r * d) | gate | k (d) | v (d)], with r heads a group and d channels a head; the gate part has r
rows in the `headwise` layout, r * d in the `expanded` one (each row of g_proj d times) and none
without a gate. A tensor-parallel rank has a contiguous share of the groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step35_patch.config.layer_plan import LayerPlan


class DriftedGateError(ValueError):
    """Rows of an expanded gate that belong to one head differ: they are no g_proj any more."""


def gate_rows_per_head(plan: LayerPlan, gate_layout: str | None) -> int:
    """Rows of linear_qkv that a head's gate takes; gate_layout None means no gate."""
    return {None: 0, "headwise": 1, "expanded": plan.kv_channels}[gate_layout]


def pack_qkv(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, plan: LayerPlan, gate_layout: str | None
) -> Tensor:
    """The whole linear_qkv weight.

    Args:
        q: [heads * d, h]; k, v: [groups * d, h]; g: [heads, h], or None without a gate.

    Returns:
        [heads * d + gate rows + 2 * groups * d, h] in the dtype of q.
    """
    groups, hidden = plan.num_query_groups, q.shape[-1]
    parts = [q.view(groups, -1, hidden)]
    if gate_layout is not None:
        rows = gate_rows_per_head(plan, gate_layout)
        parts.append(g.repeat_interleave(rows, dim=0).view(groups, -1, hidden))
    parts += [k.view(groups, -1, hidden), v.view(groups, -1, hidden)]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def unpack_qkv(
    weight: Tensor, plan: LayerPlan, gate_layout: str | None, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and g (None without a gate) from a whole linear_qkv weight; inverse of pack_qkv.

    Args:
        name: the weight's name, for messages.

    Raises:
        DriftedGateError: the `expanded` rows of a head are not all equal.
    """
    groups, channels, hidden = plan.num_query_groups, plan.kv_channels, weight.shape[-1]
    heads = plan.num_attention_heads // groups
    rows = gate_rows_per_head(plan, gate_layout)
    sections = [heads * channels, heads * rows, channels, channels]
    q, g, k, v = weight.view(groups, sum(sections), hidden).split(sections, dim=1)
    q, k, v = (part.reshape(-1, hidden) for part in (q, k, v))
    if gate_layout is None:
        return q, k, v, None
    by_head = g.reshape(plan.num_attention_heads, rows, hidden)
    refuse_drift(by_head, name)
    return q, k, v, by_head[:, 0]


def gate_drift(rows: Tensor) -> float:
    """The largest difference from a head's first row; NaN if a row became NaN, and 0 if none did.

    Args:
        rows: [..., rows of a head, h].
    """
    first = rows[..., :1, :].expand_as(rows)
    # As bits: a head whose rows are all the same NaN has not drifted.
    if torch.equal(rows.contiguous().view(torch.uint8), first.contiguous().view(torch.uint8)):
        return 0.0
    return (rows.float() - first.float()).abs().max().item()


def refuse_drift(rows: Tensor, name: str) -> None:
    """Raise DriftedGateError unless the rows that stand for one row of g_proj are equal.

    Args:
        rows: [..., rows of a head, h].
        name: the weight's name, for messages.
    """
    if drift := gate_drift(rows):
        raise DriftedGateError(
            f"{name}: the {rows.shape[-2]} gate rows of a head differ by up to {drift:.3g}, "
            "expected equal rows; trained with Megatron-Core's own gate they are no g_proj any more, "
            "and can't be used as one. Train with gate_layout='headwise', or 'expanded' here."
        )
