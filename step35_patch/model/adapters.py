"""Low-rank adapters around a live model's linear layers: found, refused, or merged into weights.

They are Megatron-Bridge's (LoRA). Its wrapper stands in the layer's place, has the layer as
`to_wrap` and as `adapter` a pair of matrices, `linear_in` (A) and `linear_out` (B), and adds
alpha / dim * B A x to the layer's output. It is known here by these names, so that nothing of
Megatron-Bridge need be there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# How a wrapper and its adapter stand in the names of parameters.
WRAPPED, ADAPTER = ".to_wrap.", ".adapter."


def base_of(module: Any) -> Any:
    """The layer itself, whether it has an adapter around it or not."""
    return getattr(module, "to_wrap", module)


def adapted_modules(chunks: Iterable[torch.nn.Module]) -> dict[str, Any]:
    """The wrappers in model chunks, by the names of what they wrap."""
    return {
        name: module
        for chunk in chunks
        for name, module in chunk.named_modules()
        if hasattr(module, "to_wrap") and hasattr(module, "adapter")
    }


def adapter_problems(wrappers: dict[str, Any]) -> list[str]:
    """A line for each adapter of a kind, or in a place, that does not go with a Step-3.5 model."""
    return [
        f"{name}: expected {problem}"
        for name, wrapper in wrappers.items()
        if (problem := _problem(wrapper))
    ]


def check_adapters(chunks: Iterable[torch.nn.Module]) -> None:
    """Raise ValueError if a model has adapters of a kind that does not go with it."""
    if problems := adapter_problems(adapted_modules(chunks)):
        raise ValueError("adapters of a Step-3.5 model:\n  " + "\n  ".join(problems))


def _problem(wrapper: Any) -> str | None:
    adapter = wrapper.adapter
    if not hasattr(adapter, "linear_in"):
        return (
            "a LoRA adapter, found those of q, k and v or of gate and up apart (CanonicalLoRA), "
            "which don't know the gate's rows; use LoRA on linear_qkv and linear_fc1, whose "
            "adapters are exported as q, k, v and g apart"
        )
    if hasattr(adapter, "weight_magnitude"):
        return (
            "a LoRA adapter, found one of DoRA, whose magnitudes neither a merged nor a separate "
            "export of Megatron-Bridge has; use LoRA"
        )
    if (ranks := _group(adapter).size()) == 1:
        return None
    if adapter.is_expert and adapter.input_is_parallel:
        return (
            f"no adapter on routed experts' linear_fc2 with expert_tensor_parallel_size {ranks}, "
            "where the ranks' outputs are summed later and Megatron-Bridge's adapter adds what is "
            "no part of the sum; set expert_tensor_parallel_size to 1, or leave "
            "'*.experts.*linear_fc2' out of target_modules"
        )
    if not adapter.base_linear_is_parallel and adapter.config.sequence_parallel:
        return (
            f"no adapter here with sequence_parallel on {ranks} tensor-parallel ranks, whose "
            "different tokens Megatron-Bridge's adapter would mix; set "
            "tensor_model_parallel_size to 1, or leave the router out of target_modules"
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
        in the parameter's shape and dtype, computed in fp32; the value itself where there is no
        adapter. Collective over the tensor-parallel group (the routed experts' one for theirs).

    Raises:
        ValueError: there are adapters of another kind.
    """
    check_adapters(chunks)
    products: dict[int, Callable[[], Tensor]] = {}
    for wrapper in adapted_modules(chunks).values():
        base, adapter = wrapper.to_wrap, wrapper.adapter
        for name, parameter in base.named_parameters(recurse=False):
            if name == "weight":
                products[id(parameter)] = functools.partial(_product, adapter, 0)
            elif name.startswith("weight"):  # grouped experts: weight0, weight1, ...
                expert = int(name.removeprefix("weight"))
                products[id(parameter)] = functools.partial(_product, adapter, expert)

    def merged(parameter: Tensor) -> Tensor:
        own, product = parameter.data, products.get(id(parameter))
        return own if product is None else (own.float() + product()).to(own.dtype)

    return merged


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
