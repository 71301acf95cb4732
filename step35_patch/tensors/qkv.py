"""Between the published q, k, v and g projections and Megatron-Core's one linear_qkv.

The functions work on whole (not tensor-parallel) weights unless they say otherwise; the order of
the rows is that of `step35_patch.tensors.qkv_layout`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.tensors.qkv_layout import QkvLayout


class DriftedGateError(ValueError):
    """Rows of an expanded gate that belong to one head differ: they are no g_proj any more."""


def pack_qkv(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, plan: LayerPlan, gate_layout: str | None
) -> Tensor:
    """The whole linear_qkv weight.

    Args:
        q: [heads * d, h].
        k: [groups * d, h].
        v: [groups * d, h].
        g: [heads, h], or None without a gate.
        plan: the layer.
        gate_layout: "headwise", "expanded", or None without a gate.

    Returns:
        [heads * d + gate rows + 2 * groups * d, h] in the dtype of q.
    """
    return join_rows(q, g, k, v, QkvLayout.of(plan, gate_layout))


def join_rows(
    q: Tensor, g: Tensor | None, k: Tensor, v: Tensor, layout: QkvLayout, dim: int = 0
) -> Tensor:
    """A linear_qkv weight, whole or a rank's, or its output; inverse of `split_rows`.

    Args:
        q: [groups * heads a group * d, h].
        g: [groups * heads a group, h], or None without a gate.
        k: [groups * d, h].
        v: as k.
        layout: of that many groups.
        dim: where the rows are; the last dimension of an output.

    Returns:
        [rows, h] in the dtype of q.
    """
    parts = [q, k, v]
    if g is not None:
        parts.insert(1, g.repeat_interleave(layout.gate_rows, dim=dim))
    by_group = [part.unflatten(dim, (layout.groups, -1)) for part in parts]
    rows = dim % q.dim()
    return torch.cat(by_group, dim=rows + 1).flatten(rows, rows + 1)


def split_rows(weight: Tensor, layout: QkvLayout) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """q, g (None without a gate), k and v of a linear_qkv weight or of its gradient.

    Of the rows that stand for one of g_proj, the first is taken; whether the others equal it is
    `refuse_drift`'s to say.

    Args:
        weight: [rows, h], whole or a rank's.
        layout: of that many rows.
    """
    hidden = weight.shape[-1]
    by_group = weight.view(layout.groups, -1, hidden)
    q, _, k, v = (part.reshape(-1, hidden) for part in by_group.split(layout.sections, dim=1))
    if not layout.gate_rows:
        return q, None, k, v
    return q, gate_rows(weight, layout)[:, :, 0].reshape(-1, hidden), k, v


def unpack_qkv(
    weight: Tensor, plan: LayerPlan, gate_layout: str | None, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and g (None without a gate) from a whole linear_qkv weight; inverse of pack_qkv.

    Args:
        weight: [rows, h].
        plan: the layer.
        gate_layout: "headwise", "expanded", or None without a gate.
        name: the weight's name, for messages.

    Raises:
        DriftedGateError: the `expanded` rows of a head are not all equal.
    """
    layout = QkvLayout.of(plan, gate_layout)
    q, g, k, v = split_rows(weight, layout)
    if g is not None:
        refuse_drift(gate_rows(weight, layout), name)
    return q, k, v, g


def gate_rows(weight: Tensor, layout: QkvLayout) -> Tensor:
    """The gate's rows of a linear_qkv weight, or of its gradient, as a view.

    Args:
        weight: [rows, h], whole or a rank's.
        layout: of that many rows.

    Returns:
        [groups, heads a group, gate rows a head, h].
    """
    q, gate, _, _ = layout.sections
    by_group = weight.view(layout.groups, sum(layout.sections), -1)
    gates = by_group[:, q : q + gate]
    return gates.view(layout.groups, layout.heads, layout.gate_rows, weight.shape[-1])


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
            "expected equal rows; trained with Megatron-Core's own gate they are no g_proj any "
            "more, and can't be used as one. Train with gate_layout='headwise', or 'expanded' here."
        )
