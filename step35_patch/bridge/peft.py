"""Megatron-Bridge's export of adapters, by the rows of a Step-3.5 model.

An adapter of a linear layer that is made of several published tensors, linear_qkv and linear_fc1,
has the rows of all of them in its B. Megatron-Bridge splits them by a whole model's head counts,
without a gate, or by gate and up; here they are split as the weight itself is, by the table of
tensors. How adapters are gathered, merged and named is Megatron-Bridge's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.core import parallel_state
from torch import Tensor

from step35_patch.model.adapters import check_adapters
from step35_patch.model.description import Step35Runtime, runtime_for
from step35_patch.tensors.qkv import split_rows
from step35_patch.tensors.table import MadeOf, Row, tensor_table

_LORA = re.compile(r"\.lora_[AB]\.weight$")


class AdapterBridge(MegatronModelBridge):
    """What Step35Bridge does otherwise than Megatron-Bridge with adapters."""

    _runtime: Step35Runtime | None = None
    # The rows of the table by the published tensors that they are made of; known with the runtime.
    _rows: dict[str, Row]

    def know(self, megatron_model: Any) -> Step35Runtime:
        """Note the gate layout of a model, and return what it is.

        Raises:
            ValueError: it is not a Step-3.5 model.
        """
        self._runtime = runtime = runtime_for(unwrap_model(megatron_model)[0].config)
        if runtime is None:
            raise ValueError(
                "megatron_model: expected a Step-3.5 model, found one whose config is not this "
                "package's; make it by AutoBridge's to_megatron_provider"
            )
        table = tensor_table(runtime.config, runtime.gate_layout)
        self._rows = {tensor.name: row for row in table for tensor in row.published}
        return runtime

    def build_adapter_conversion_tasks(
        self, megatron_model: Any, exclude_adapter_base_prefixes: Iterable[str] | None = None
    ) -> dict[str, list[Any]]:
        """Megatron-Bridge's tasks, of adapters that go with the model.

        Raises:
            ValueError: the model is none of Step-3.5, or has adapters that are not LoRA's; or
                experts that are not grouped, each with its adapter, on several expert-parallel
                ranks: Megatron-Bridge takes all ranks' adapters for the first one's.
        """
        chunks = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        self.know(chunks)
        check_adapters(chunks)
        tasks: dict[str, list[Any]] = super().build_adapter_conversion_tasks(
            megatron_model, exclude_adapter_base_prefixes
        )
        ranks = parallel_state.get_expert_model_parallel_world_size()
        if ranks > 1 and any(".local_experts." in prefix for prefix in tasks):
            raise ValueError(
                f"adapters of routed experts: expected grouped experts on {ranks} expert-parallel "
                "ranks, found experts that are modules of their own, whose adapters "
                "Megatron-Bridge can't tell apart; set moe_grouped_gemm on the provider, or leave "
                "the routed experts without adapters"
            )
        return tasks

    def stream_adapter_weights_megatron_to_hf(
        self, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        """A and B by published names; of routed experts [experts, r, h] and [experts, n, r].

        Raises:
            ValueError: as `build_adapter_conversion_tasks`; or some of a layer's experts have
                adapters and others have none, though they are published as one tensor.
        """
        experts: dict[str, list[Tensor]] = {}
        self.know(megatron_model)
        exported = super().stream_adapter_weights_megatron_to_hf(megatron_model, *args, **kwargs)
        for name, weight in exported:
            row = self._rows[_LORA.sub(".weight", name)]
            if not row.is_expert or weight.dim() == 3:
                yield HFWeightTuple(name, weight)
                continue
            # Experts that are modules of their own, which come one after the other.
            found = experts.setdefault(name, [])
            found.append(weight)
            if len(found) == row.published[0].shape[0]:
                yield HFWeightTuple(name, torch.stack(experts.pop(name)))
        if experts:
            raise ValueError(
                "adapters of routed experts: expected one for each expert of a layer or none, "
                "found them for some only:\n  "
                + "\n  ".join(f"{name}: {len(found)}" for name, found in experts.items())
            )

    def _by_published_name(self, names: Iterable[str], linear_out: Tensor) -> dict[str, Tensor]:
        """The rows of B that belong to each of a parameter's published tensors.

        Args:
            names: of the published tensors.
            linear_out: B, over all tensor-parallel ranks: [rows, r], or [experts, rows, r].
        """
        row = self._rows[next(iter(names))]
        published = [tensor.name for tensor in row.published]
        if row.qkv is not None:
            q, *g, k, v = published
            q_rows, g_rows, k_rows, v_rows = split_rows(linear_out, row.qkv)
            gate = {} if g_rows is None else {g[0]: g_rows}
            return {q: q_rows, **gate, k: k_rows, v: v_rows}
        if row.made_of is MadeOf.STACKED:
            # Each rank has its part of each, one below the other.
            of_experts = parallel_state.get_expert_tensor_parallel_world_size
            of_others = parallel_state.get_tensor_model_parallel_world_size
            ranks = of_experts() if row.is_expert else of_others()
            parts = linear_out.unflatten(-2, (ranks, len(published), -1)).unbind(-3)
            return {name: part.flatten(-3, -2) for name, part in zip(published, parts, strict=True)}
        if row.is_vocabulary:
            linear_out = linear_out[: row.shape[0]]
        return {published[0]: linear_out}

    def _get_fused_adapter_linear_out_slices(
        self,
        megatron_model: Any,
        base_hf_weight_names: list[str],
        linear_out_tensor: Tensor,
        is_expert: bool = False,
    ) -> dict[str, Tensor]:
        return self._by_published_name(base_hf_weight_names, linear_out_tensor)

    def _merge_lora_adapter_weights(
        self,
        megatron_model: Any,
        converted_weights_dict: dict[str, Tensor],
        adapter_weights: list[Any],
    ) -> dict[str, Tensor]:
        merge = super()._merge_lora_adapter_weights
        merged: dict[str, Tensor] = {}
        for name, weight in converted_weights_dict.items():
            own = self._of_one(name, adapter_weights)
            merged |= merge(megatron_model, {name: weight}, own)
        return merged

    def _merge_grouped_export_adapter_weights(
        self,
        task: Any,
        converted_weights_dict: dict[str, Tensor],
        adapter_weights: list[Any],
        num_moe_experts: int,
    ) -> dict[str, Tensor]:
        merge = super()._merge_grouped_export_adapter_weights
        ranks = parallel_state.get_expert_model_parallel_world_size()
        first = task.mapping.expert() % (num_moe_experts // ranks)
        merged: dict[str, Tensor] = {}
        for name, weight in converted_weights_dict.items():
            own = self._of_one(name, adapter_weights)
            if ranks == 1:
                merged |= merge(task, {name: weight}, own, num_moe_experts)
                continue
            # One expert of each rank, of which each has its own adapter.
            parts = []
            for rank, part in enumerate(weight):
                expert = first + rank * (num_moe_experts // ranks)
                one = replace(task, global_param_name=f"weight{expert}")
                parts.append(merge(one, {name: part}, own, num_moe_experts)[name])
            merged[name] = torch.stack(parts)
        return merged

    def _of_one(self, name: str, adapter_weights: list[Any]) -> list[Any]:
        """An adapter, which is one of LoRA's, with the rows of one published tensor in its B."""
        (adapter,) = adapter_weights
        linear_out = adapter.linear_out_weight
        own = self._by_published_name([name], linear_out.weight)[name]
        # Megatron-Bridge's is a NamedTuple.
        return [replace(adapter, linear_out_weight=linear_out._replace(weight=own))]
