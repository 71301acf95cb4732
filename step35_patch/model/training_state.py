"""What stands around a live model's parameters in training, and has values of its own for them.

- Megatron's DistributedDataParallel: with the distributed optimizer each rank updates its shard of
  the parameters, and with `overlap_param_gather` the others' are gathered as late as in the next
  forward pass. Until then a rank's parameters are partly those from before the step.
- The optimizer: for parameters in 16 bits it holds fp32 ones, the main parameters or masters, and
  writes the parameters anew from them in each step; the distributed optimizer's are shards. With
  CPU offload (HybridDeviceOptimizer) there are copies of these in turn.

Megatron's own means are used as far as there are any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


class Optimizer(Protocol):
    """What get_megatron_optimizer returns, or one of torch's."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's optimizers have them."""


@dataclass(frozen=True)
class _Master:
    """The fp32 values that an optimizer holds for a parameter, as far as this rank has them.

    Attributes:
        values: Consecutive elements, or None.
        start: The place of the first one in the parameter, counted in elements.
        group: The ranks that have all of them together; None if this rank has.
    """

    values: Tensor | None
    start: int = 0
    group: ProcessGroup | None = None


def unwrap(wrapped: torch.nn.Module) -> tuple[Any, list[Any]]:
    """The GPTModel of a model chunk, and the wrappers around it, the outermost first."""
    wrappers = []
    chunk: Any = wrapped
    while hasattr(chunk, "module"):  # DistributedDataParallel, Float16Module
        wrappers.append(chunk)
        chunk = chunk.module
    return chunk, wrappers


class TrainingState:
    """The wrappers and the optimizer of a model's chunks.

    Args:
        model: The chunks, wrapped or not.
        optimizer: The one that trains them, if there is one.

    Raises:
        ValueError: The optimizer is another model's, or the parameters are kept in a way in which
            they can be neither read nor written here.
    """

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: Optimizer | None):
        self.optimizer = optimizer
        self._parts = list(parts_of(optimizer))
        self._parameters: dict[str, Tensor] = {}
        wrappers = [part for p in self._parts for part in getattr(p, "model_chunks", ())]
        for number, wrapped in enumerate(model):
            chunk, around = unwrap(wrapped)
            prefix = f"chunk {number}: " if len(model) > 1 else ""
            self._parameters |= {prefix + name: p for name, p in chunk.named_parameters()}
            wrappers += around
        # Each once: modules are equal to themselves only.
        self._data_parallel = list(dict.fromkeys(w for w in wrappers if hasattr(w, "ddp_config")))
        self._refuse_other_storage()
        if optimizer is not None:
            self._refuse_another_models()

    def _refuse_other_storage(self) -> None:
        configs = [wrapper.ddp_config for wrapper in self._data_parallel]
        if any(getattr(config, "use_megatron_fsdp", False) for config in configs) or any(
            isinstance(parameter, DTensor) for parameter in self._parameters.values()
        ):
            raise ValueError(
                "model: expected whole parameters on each data-parallel rank, found FSDP's shards; "
                "load and save without FSDP, for example with --use-distributed-optimizer"
            )
        for name, parameter in self._parameters.items():
            if type(parameter.data) is not Tensor:
                raise ValueError(
                    f"{name}: expected a plain tensor, found {type(parameter.data).__name__}; "
                    "parameters that are stored in fewer bits (--fp8-param-gather) hold neither "
                    "what is loaded nor what is trained. Train without that, or go by a Megatron "
                    "checkpoint and `step35-patch convert`"
                )
        if any(getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False) for config in configs):
            raise ValueError(
                "reuse_grad_buf_for_mxfp8_param_ag: expected False, found True; parameters that "
                "wait in the gradients' buffer can be neither loaded nor saved"
            )
        if self._data_parallel:
            return
        for name, parameter in self._parameters.items():
            # As the distributed optimizer's parameters do, and only theirs.
            in_a_buffer = parameter.untyped_storage().nbytes() > parameter.nbytes
            if in_a_buffer and hasattr(parameter, "main_grad"):
                raise ValueError(
                    f"{name}: lies in a buffer of Megatron's DistributedDataParallel, which may "
                    "have parameters to gather; pass the wrapped model, or optimizer="
                )

    def _refuse_another_models(self) -> None:
        own = {id(parameter) for parameter in self._parameters.values()}
        held = {id(parameter) for part in self._parts for parameter in _trained(part)}
        foreign = len(held - own)
        forgotten = [
            name
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and id(parameter) not in held
        ]
        if _is_layer_wise(self.optimizer):
            forgotten = []  # what other ranks train
        if foreign or forgotten:
            raise ValueError(
                "optimizer: expected the one of this model and of all of its chunks; found one "
                f"that trains {foreign} parameters that are not the model's, and does not train "
                f"{len(forgotten)} that are" + "".join(f"\n  {name}" for name in forgotten[:3])
            )

    def complete_parameters(self) -> None:
        """Gather what the optimizer has updated on other ranks; collective over data parallelism.

        As Megatron does before it saves. Afterwards nothing is under way that would write to the
        parameters.
        """
        late = [w for w in self._data_parallel if w.ddp_config.overlap_param_gather]
        with torch.no_grad():
            # The first time waits only where a gather is under way. With
            # overlap_param_gather_with_optimizer_step, Megatron begins that of the first chunk's
            # experts before the experts' step.
            for wrapper in late * 2:
                wrapper.start_param_sync(force_sync=True)

    def check_loadable(self) -> None:
        """Refuse to load what the next step would undo.

        Raises:
            ValueError: The parameters have masters, and the optimizer is missing or cannot be
                told.
        """
        with_masters = [n for n, p in self._parameters.items() if hasattr(p, "main_param")]
        if self.optimizer is None and with_masters:
            raise ValueError(
                f"optimizer: expected the one that trains the model, found None; "
                f"{len(with_masters)} parameters ({with_masters[0]} is the first) have fp32 main "
                "parameters, from which its next step would put the old weights back; pass "
                "optimizer=, or load before get_megatron_optimizer"
            )
        for part in self._parts:
            if _keeps_masters_to_itself(part) and inner_optimizer(part).state:
                raise ValueError(
                    "optimizer: the precision-aware optimizer has masters of its own since its "
                    "first step, and cannot be told of new weights; load before that step, or "
                    "train without use_precision_aware_optimizer"
                )

    def parameters_changed(self) -> None:
        """Tell the optimizer that the parameters have new values; its moments stay."""
        reload = getattr(self.optimizer, "reload_model_params", None)
        if reload is not None:
            reload()
        with torch.no_grad():
            for part in self._parts:
                if not isinstance(inner_optimizer(part), HybridDeviceOptimizer):
                    continue
                # Megatron tells only the fp32 copies of what is in 16 bits: neither fp32 shards
                # nor copies on the CPU of what is in fp32.
                for parameter, shard, start in _float16_shards(part):
                    shard.data.copy_(parameter.data.view(-1)[start : start + shard.numel()])
                for outer, inner in inner_optimizer(part).param_to_inner_param.items():
                    inner.data.copy_(outer)

    def masters(self) -> Callable[[Tensor], Tensor]:
        """The fp32 values that the optimizer trains.

        Returns:
            From a parameter to its values, in its shape and on its device, in fp32; collective
            over the data-parallel group with the distributed optimizer. They may be those that
            the optimizer holds. A parameter in fp32, or one that is not trained, has its own.

        Raises:
            ValueError: There is no optimizer, or it has no masters that can be read.
        """
        if self.optimizer is None:
            raise ValueError("masters: expected optimizer= that holds them, found None")
        if _is_layer_wise(self.optimizer):
            raise ValueError(
                "masters: a layer-wise distributed optimizer holds each parameter's on one rank "
                "only, from where they are not gathered; save without masters"
            )
        if any(map(_keeps_masters_to_itself, self._parts)):
            raise ValueError(
                "masters: the precision-aware optimizer holds them in a form of its own; save "
                "without masters, or train without use_precision_aware_optimizer"
            )
        found: dict[int, _Master] = {}
        for part in self._parts:
            found |= {id(parameter): master for parameter, master in _masters(part)}
        without = [
            name
            for name, p in self._parameters.items()
            if p.requires_grad and p.dtype != torch.float32 and id(p) not in found
        ]
        if without:
            raise ValueError(
                f"masters: {len(without)} parameters ({without[0]} is the first) are trained in "
                "less than fp32 without any; save without masters"
            )

        def values(parameter: Tensor) -> Tensor:
            master = found.get(id(parameter))
            return parameter.data.float() if master is None else _whole(master, parameter)

        return values


def parts_of(optimizer: Any) -> Iterator[Any]:
    """The optimizers that a chained one is made of, without those that have no parameters."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        for part in chained:
            yield from parts_of(part)
    elif optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def inner_optimizer(part: Any) -> Any:
    """The torch optimizer in one of Megatron's; None if `part` is torch's own."""
    return getattr(part, "optimizer", None)


def _is_layer_wise(optimizer: Any) -> bool:
    """Whether it is or contains Megatron's LayerWiseDistributedOptimizer.

    Its parts are Float16OptimizerWithFloat16Params, which have this rank's parameters only.
    """
    chained = getattr(optimizer, "chained_optimizers", ())
    return hasattr(optimizer, "allgather_params") or any(map(_is_layer_wise, chained))


def _keeps_masters_to_itself(part: Any) -> bool:
    """Whether Transformer Engine's FusedAdam has the masters in its state."""
    return (
        isinstance(part, DistributedOptimizer)
        and part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        and not isinstance(inner_optimizer(part), HybridDeviceOptimizer)
    )


def _trained(part: Any) -> Iterator[Tensor]:
    """The model's parameters that an optimizer trains, on this rank or another."""
    if isinstance(part, DistributedOptimizer):
        groups = [buffer.params for buffer in part.buffers]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        groups = [*part.float16_groups, *part.fp32_from_fp32_groups]
    else:
        groups = [group["params"] for group in part.param_groups]
    return itertools.chain.from_iterable(groups)


def _float16_shards(part: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of a distributed optimizer: a 16-bit parameter, what it trains of it on this rank, and where.

    That is an fp32 shard, or with the precision-aware optimizer a part of the parameter.
    """
    if not isinstance(part, DistributedOptimizer):
        return
    groups = (
        part.model_float16_groups,
        part.shard_float16_groups,
        part.shard_fp32_from_float16_groups,
    )
    for group in zip(*groups, strict=True):
        for parameter, shard, master in zip(*group, strict=True):
            start = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, shard if master is None else master, start


def _masters(part: Any) -> Iterator[tuple[Tensor, _Master]]:
    """An optimizer's masters, for all of its 16-bit parameters; a later one of two counts."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, values in zip(*group, strict=True):
                yield parameter, _Master(values)
    elif isinstance(part, DistributedOptimizer):
        for parameter in _trained(part):
            if parameter.dtype != torch.float32:
                yield parameter, _Master(None, group=part.data_parallel_group)
        inner = getattr(
            inner_optimizer(part), "param_to_inner_param", {}
        )  # HybridDeviceOptimizer's
        for parameter, shard, start in _float16_shards(part):
            yield parameter, _Master(inner.get(shard, shard), start, part.data_parallel_group)


def _whole(master: _Master, parameter: Tensor) -> Tensor:
    """All of a parameter's masters, from the ranks that have them."""
    if master.group is None and master.values is not None:
        return master.values.data.to(parameter.device)
    # One rank has an element and the others zeros. As integers, whose sums keep all bits (as
    # floats, -0.0 would become 0.0), and with the number of elements behind them.
    count = parameter.numel()
    sums = torch.zeros(count + 1, dtype=torch.int32, device=parameter.device)
    if master.values is not None:
        own = master.values.data.view(-1).to(sums.device)
        sums[master.start : master.start + own.numel()] = own.view(torch.int32)
        sums[count] = own.numel()
    torch.distributed.all_reduce(sums, group=master.group)
    if sums[count] != count:
        raise RuntimeError(
            f"masters: expected a parameter's {count} elements on its data-parallel ranks, found "
            f"{int(sums[count])}"
        )
    return sums[:count].view(torch.float32).view(parameter.shape)
