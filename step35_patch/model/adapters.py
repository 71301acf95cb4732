"""Low-rank adapters around a live model's linear layers: found, refused, or merged into weights.

They are Megatron-Bridge's. Its wrapper stands in the layer's place, has the layer as `to_wrap` and
as `adapter` a pair of matrices, `linear_in` (A) and `linear_out` (B), and adds alpha / dim * B A x
to the layer's output. DoRA's has besides `weight_magnitude` (m), one number a row, by which each
row of W + alpha / dim * B A is made as long as m says. `step35_patch.bridge.canonical` has a pair
for each published matrix of a layer. They are known here by these names, so that nothing of
Megatron-Bridge need be there.

ModelOpt's LoRA changes the layer itself, which then has `_lora_adapters`, pairs of modules by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


def base_of(module: Any) -> Any:
    """The layer itself, whether it has an adapter around it or not."""
    return getattr(module, "to_wrap", module)


def adapted_modules(chunks: Iterable[torch.nn.Module]) -> dict[str, Any]:
    """The wrappers in model chunks, by the names of what they wrap, and ModelOpt's layers."""
    return {
        name: module
        for chunk in chunks
        for name, module in chunk.named_modules()
        if (hasattr(module, "to_wrap") and hasattr(module, "adapter")) or of_modelopt(module)
    }


def of_modelopt(module: Any) -> dict[str, dict[str, Any]]:
    """ModelOpt's adapters of a layer by their names, each with lora_a, lora_b, scale and enable."""
    found: dict[str, dict[str, Any]] = getattr(module, "_lora_adapters", {})
    return found


def adapter_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """All parameters of a model's adapters."""
    for wrapper in adapted_modules([model]).values():
        pairs = of_modelopt(wrapper).values()
        matrices = [pair[matrix] for pair in pairs for matrix in ("lora_a", "lora_b")]
        for module in matrices or [wrapper.adapter]:
            yield from module.parameters()


def by_rows_of(layer: Any) -> list[Tensor]:
    """What an adapter around a layer has row by row, as the layer has its rows.

    Returns:
        B [rows, r], and DoRA's magnitudes [rows, 1], of this rank and without a graph.
    """
    found = [pair["lora_b"].weight.data for pair in of_modelopt(layer).values()]
    adapter: Any = getattr(layer, "adapter", None)
    if hasattr(adapter, "linear_out"):
        found.append(adapter.linear_out.weight.data)
    if hasattr(adapter, "weight_magnitude"):
        found.append(adapter.weight_magnitude.data[:, None])
    return found


def adapter_problems(wrappers: dict[str, Any]) -> list[str]:
    """A line for each adapter of a kind, or in a place, that does not go with a Step-3.5 model."""
    return [
        f"{name}: expected {problem}"
        for name, wrapper in wrappers.items()
        if (problem := _problem(name, wrapper))
    ]


def check_adapters(chunks: Iterable[torch.nn.Module]) -> None:
    """Raise ValueError if a model has adapters of a kind that does not go with it."""
    if problems := adapter_problems(adapted_modules(chunks)):
        raise ValueError("adapters of a Step-3.5 model:\n  " + "\n  ".join(problems))


def _problem(name: str, wrapper: Any) -> str | None:
    if of_modelopt(wrapper):
        return _problem_of_modelopt(name, wrapper.config)
    adapter = wrapper.adapter
    if hasattr(adapter, "weight_magnitude"):
        return _problem_of_dora(name, wrapper)
    if hasattr(adapter, "linear_in"):
        return _problem_of_pair(adapter, wrapper.to_wrap)
    if hasattr(wrapper, "joined"):
        return _problem_of_pair(next(iter(adapter.values())), wrapper.to_wrap)
    return (
        "another class, found Megatron-Bridge's CanonicalLoRA, which doesn't know the gate's rows; "
        "use step35_patch.bridge.Step35CanonicalLoRA"
    )


def _problem_of_modelopt(name: str, config: TransformerConfig) -> str | None:
    if config.sequence_parallel:
        return (
            "no adapter of ModelOpt's with sequence_parallel, found it on: of the gradients of A "
            "or B each rank has its own tokens' alone, and nothing sums them; leave it off, or use "
            "Megatron-Bridge's LoRA"
        )
    if ".experts." in name and config.expert_model_parallel_size > 1:
        return (
            "no adapter of ModelOpt's on routed experts with expert_model_parallel_size "
            f"{config.expert_model_parallel_size}, where its gradients are summed over all ranks' "
            "experts; set it to 1, or use Megatron-Bridge's LoRA"
        )
    return None


def _problem_of_pair(adapter: Any, layer: Any) -> str | None:
    if adapter.linear_in.weight.dim() != adapter.linear_out.weight.dim():
        return (
            "an adapter for all experts or one for each, found A or B alone shared by them "
            "(experts_shared_outer_loras), which Megatron-Bridge exports expert by expert under "
            "one name; use share_expert_adapters"
        )
    if (ranks := _group(adapter).size()) == 1:
        return None
    if adapter.is_expert:
        return (
            f"no adapter on routed experts with expert_tensor_parallel_size {ranks}, where of the "
            "gradients of linear_fc1's each rank has a part that Megatron-Bridge's adapter does "
            "not sum, and linear_fc2's adds what is no part of the ranks' sum; set "
            "expert_tensor_parallel_size to 1, or leave '*.experts.*' out of target_modules"
        )
    if getattr(layer, "return_layernorm_output_gathered", False):
        return (
            f"an adapter that gathers its input itself on {ranks} tensor-parallel ranks with "
            "sequence_parallel, found one that takes it from Transformer Engine's norm "
            "(return_layernorm_output_gathered), which gives the adapter's gradient to no layer "
            "before it; set sequence_parallel_input_regather on LoRA"
        )
    if not adapter.base_linear_is_parallel and adapter.config.sequence_parallel:
        return (
            f"no adapter here with sequence_parallel on {ranks} tensor-parallel ranks, whose "
            "different tokens Megatron-Bridge's adapter would mix; set "
            "tensor_model_parallel_size to 1, or leave the router out of target_modules"
        )
    return None


def _problem_of_dora(name: str, wrapper: Any) -> str | None:
    adapter = wrapper.adapter
    if (ranks := _group(adapter).size()) > 1:
        return (
            f"no DoRA with tensor_model_parallel_size {ranks}: Megatron-Bridge takes the length of "
            "a rank's part of a row for the row's (linear_proj, linear_fc2), counts one rank's "
            "magnitudes in the gradients' norm, and saves linear_fc1's in an order that another "
            "size does not read; set it to 1, or use LoRA"
        )
    if ".experts." in name or not adapter.base_linear_is_parallel:
        return (
            "no DoRA on routed experts, whose gradients Megatron-Bridge's would sum over all "
            "ranks' experts, and on routers, whose choice it would scale; leave them out of "
            "target_modules, or use LoRA"
        )
    if "output_layer" in name or "mtp_output_heads" in name:
        return (
            "no DoRA on output matrices, which are called with more than Megatron-Bridge's takes; "
            "leave them out of target_modules, or use LoRA"
        )
    dropout: float = getattr(adapter.dropout, "p", 0.0)
    if dropout and hasattr(wrapper.to_wrap, "layer_norm_weight"):
        return (
            f"no dropout of DoRA here, found {dropout}: the layer has the norm in it, "
            "which Megatron-Bridge then applies a second time; set dropout to 0, or use LoRA"
        )
    return None


def _group(adapter: Any) -> ProcessGroup:
    """The ranks over which an adapter's matrices are cut."""
    group: ProcessGroup = (
        adapter.tp_group if hasattr(adapter, "tp_group") else adapter.expert_tp_group
    )
    return group


def merged_values(chunks: Sequence[torch.nn.Module]) -> Callable[[Tensor], Tensor]:
    """What the parameters of a model amount to together with its adapters.

    Args:
        chunks: the model's chunks.

    Returns:
        A function of a parameter or buffer of theirs: this rank's part of W + alpha / dim * B A,
        with DoRA scaled row by row, in the parameter's shape and dtype, computed in fp32; the
        value itself where there is no adapter. Collective over the tensor-parallel group (the
        routed experts' one for theirs).

    Raises:
        ValueError: there are adapters of another kind.
    """
    check_adapters(chunks)
    merges: dict[int, Callable[[Tensor], Tensor]] = {}
    for wrapper in adapted_modules(chunks).values():
        for name, parameter in base_of(wrapper).named_parameters(recurse=False):
            if name.startswith("weight"):  # of grouped experts weight0, weight1, ...
                expert = int(name.removeprefix("weight") or 0)
                merges[id(parameter)] = functools.partial(_merged, wrapper, expert)

    def merged(parameter: Tensor) -> Tensor:
        own, merge = parameter.data, merges.get(id(parameter))
        return own if merge is None else merge(own.float()).to(own.dtype)

    return merged


def _merged(wrapper: Any, expert: int, own: Tensor) -> Tensor:
    """This rank's part of a weight with its adapter's part, fp32.

    Args:
        wrapper: around the weight's layer, or ModelOpt's layer itself.
        expert: of an adapter that has a pair for each expert.
        own: the weight.
    """
    for pair in of_modelopt(wrapper).values():
        if pair["enable"]:
            a, b = (pair[matrix].weight.data.float() for matrix in ("lora_a", "lora_b"))
            own = own + pair["scale"] * (b @ a)
    if of_modelopt(wrapper):
        return own
    adapter = wrapper.adapter
    if not hasattr(adapter, "linear_in"):
        parts = {name: _product(pair, expert) for name, pair in adapter.items()}
        joined: Tensor = wrapper.joined(parts, 0)
        return own + joined
    own = own + _product(adapter, expert)
    if not hasattr(adapter, "weight_magnitude"):
        return own
    return with_row_lengths(own, adapter.weight_magnitude.data)


def with_row_lengths(matrix: Tensor, lengths: Tensor) -> Tensor:
    """A matrix [rows, columns] in fp32, its rows made as long as `lengths` [rows] says.

    DoRA's formula (Liu et al., 2024, equation 5).
    """
    matrix = matrix.float()
    by_row: Tensor = lengths.float() / torch.linalg.norm(matrix, dim=1)
    return by_row[:, None] * matrix


def _product(adapter: Any, expert: int) -> Tensor:
    """This rank's part of alpha / dim * B A, fp32."""
    a, b = (
        weight.data[expert] if weight.dim() == 3 else weight.data
        for weight in (adapter.linear_in.weight, adapter.linear_out.weight)
    )
    group = _group(adapter)
    whole = not adapter.base_linear_is_parallel
    if whole or not adapter.input_is_parallel:
        a = _rows(a, group)
    if whole or adapter.input_is_parallel:
        b = _rows(b, group)
    product: Tensor = adapter.alpha / adapter.dim * (b.float() @ a.float())
    return product


def _rows(part: Tensor, group: ProcessGroup) -> Tensor:
    """The whole of a matrix that is cut by rows."""
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
