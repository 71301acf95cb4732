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
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.core import parallel_state
from torch import Tensor

from step35_patch.model.adapters import (
    adapted_modules,
    check_adapters,
    of_modelopt,
    with_row_lengths,
)
from step35_patch.model.description import Step35Runtime, runtime_for
from step35_patch.tensors.qkv import split_rows
from step35_patch.tensors.table import MadeOf, Row, tensor_table

_LORA = re.compile(r"\.lora_[AB]\.weight$")


class AdapterBridge(MegatronModelBridge):
    """What Step35Bridge does otherwise than Megatron-Bridge with adapters."""

    _runtime: Step35Runtime | None = None
    # The rows of the table by the published tensors that they are made of; known with the runtime.
    _rows: dict[str, Row]
    # DoRA's magnitudes by the prefixes of the adapted layers, of all pipeline stages.
    _magnitudes: dict[str, Tensor]

    def know(self, megatron_model: Any) -> Step35Runtime:
        """Note the gate layout of a model, and return what it is.

        Raises:
            ValueError: it is not a Step-3.5 model, or has adapters of ModelOpt's.
        """
        chunks = unwrap_model(megatron_model)
        self._runtime = runtime = runtime_for(chunks[0].config)
        if runtime is None:
            raise ValueError(
                "megatron_model: expected a Step-3.5 model, found one whose config is not this "
                "package's; make it by AutoBridge's to_megatron_provider"
            )
        of_others = [n for n, layer in adapted_modules(chunks).items() if of_modelopt(layer)]
        if of_others:
            raise ValueError(
                f"adapters: expected Megatron-Bridge's, found ModelOpt's on {len(of_others)} "
                f"layers, {of_others[0]} among them, which Megatron-Bridge would leave out; call "
                "step35_patch.checkpoint.save_hf_weights(adapters='merged')"
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
        self._magnitudes = _magnitudes(chunks, tasks)
        return tasks

    def _get_base_hf_param_names_for_adapter(
        self,
        mapping_registry: MegatronMappingRegistry,
        global_base_prefix: str,
        adapter_key: str | None,
        base_suffix: str,
    ) -> list[str]:
        names: list[str] = super()._get_base_hf_param_names_for_adapter(
            mapping_registry, global_base_prefix, None, base_suffix
        )
        return [name for name in names if _belongs(name, adapter_key)]

    def stream_adapter_weights_megatron_to_hf(
        self, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        """A and B by published names; of routed experts [experts, r, h] and [experts, n, r].

        Of DoRA's adapters also the magnitudes, [n], as `lora_magnitude_vector`.

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
        registry = self.mapping_registry() if self._magnitudes else None
        for prefix, lengths in self._magnitudes.items():
            names = self._get_base_hf_param_names_for_adapter(registry, prefix, None, ".weight")
            for name, part in self._by_published_name(names, lengths[:, None]).items():
                stem = name.removesuffix(".weight")
                yield HFWeightTuple(f"{stem}.lora_magnitude_vector", part[:, 0].contiguous())
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
            lengths = self._magnitudes.get(adapter_weights[0].global_base_prefix)
            if not own:
                merged[name] = weight
            elif lengths is None:
                merged |= merge(megatron_model, {name: weight}, own)
            else:
                whole = merge(megatron_model, {name: weight.float()}, own)[name]
                part = self._by_published_name([name], lengths[:, None])[name][:, 0]
                merged[name] = with_row_lengths(whole, part.to(whole.device)).to(weight.dtype)
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
            if not own:
                merged[name] = weight
                continue
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
        """The adapter of one published tensor, with its rows alone in B; or none."""
        own_adapters = [one for one in adapter_weights if _belongs(name, one.adapter_key)]
        if not own_adapters:
            return []
        (adapter,) = own_adapters
        if adapter.adapter_key is not None:
            return [replace(adapter, adapter_key=None)]
        linear_out = adapter.linear_out_weight
        own = self._by_published_name([name], linear_out.weight)[name]
        # Megatron-Bridge's is a NamedTuple.
        return [replace(adapter, linear_out_weight=linear_out._replace(weight=own))]


def _belongs(name: str, adapter_key: str | None) -> bool:
    """Whether an adapter is a published tensor's: of `adapter_q` q_proj's, of None all."""
    part = adapter_key and adapter_key.removeprefix("adapter_")
    return part is None or name.endswith(f".{part}_proj.weight")


def _magnitudes(chunks: Any, tasks: dict[str, list[Any]]) -> dict[str, Tensor]:
    """DoRA's magnitudes [rows] by prefix, of all pipeline stages: some MB of a whole model."""
    of_layer = {
        id(wrapper.adapter.linear_in): wrapper.adapter.weight_magnitude.detach()
        for wrapper in adapted_modules(chunks).values()
        if hasattr(wrapper.adapter, "weight_magnitude")
    }
    own = {
        prefix: of_layer[id(task.linear_in_task.megatron_module)].cpu()
        for prefix, found in tasks.items()
        for task in found
        if id(task.linear_in_task.megatron_module) in of_layer
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(stages, own, group=group)
    return {prefix: lengths for stage in stages for prefix, lengths in stage.items()}
