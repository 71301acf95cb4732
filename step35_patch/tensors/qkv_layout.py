"""How the rows of Megatron-Core's linear_qkv stand, which holds q, the gate, k and v together.

By query group, [q (r * d) | gate (r * n) | k (d) | v (d)], with r heads a group, d channels a head
and n gate rows a head: 1 in the `headwise` layout, d in the `expanded` one (each row of g_proj d
times), 0 without a gate. A tensor-parallel rank has a contiguous share of the groups.

Only the standard library is used; `step35_patch.tensors.qkv` has what needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from step35_patch.config.layer_plan import LayerPlan


class Sections(NamedTuple):
    """Rows of one query group, in their order."""

    q: int
    gate: int
    k: int
    v: int


@dataclass(frozen=True, slots=True)
class QkvLayout:
    """The rows of one layer's linear_qkv, whole or of one tensor-parallel rank.

    Attributes:
        groups: Query groups.
        heads: Query heads of a group.
        channels: Rows of a head of q, k or v.
        gate_rows: Rows of a head's gate: 1, `channels`, or 0 without a gate.
    """

    groups: int
    heads: int
    channels: int
    gate_rows: int

    @classmethod
    def of(cls, plan: LayerPlan, gate_layout: str | None) -> QkvLayout:
        """The whole layout of a layer.

        Args:
            plan: The layer.
            gate_layout: `"headwise"`, `"expanded"`, or None without a gate.
        """
        return cls(
            groups=plan.num_query_groups,
            heads=plan.num_attention_heads // plan.num_query_groups,
            channels=plan.kv_channels,
            gate_rows={None: 0, "headwise": 1, "expanded": plan.kv_channels}[gate_layout],
        )

    def share(self, size: int) -> QkvLayout:
        """What one of `size` tensor-parallel ranks has of it."""
        return replace(self, groups=self.groups // size)

    @property
    def sections(self) -> Sections:
        """The rows of one query group."""
        queries = self.heads * self.channels
        return Sections(queries, self.heads * self.gate_rows, self.channels, self.channels)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.groups * sum(self.sections)
