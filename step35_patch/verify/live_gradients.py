"""The gradients of a model in training, in the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from step35_patch.model.live_weights import entries_of
from step35_patch.model.training_state import unwrap


def published_gradients(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Every gradient by its published name, whole, as `finalize_model_grads` left it.

    Collective over the tensor-, expert- and data-parallel groups; each pipeline stage has its own
    layers' gradients, the one with the MTP layers those of its copy of the embedding besides.

    Args:
        chunks: the model chunks of this rank, each in Megatron-Core's DistributedDataParallel.

    Returns:
        Copies, in the published shapes and the dtype of `main_grad`. Router biases have none.
    """
    gradients: dict[str, Tensor] = {}
    with torch.no_grad():
        for chunk in chunks:
            if chunk.ddp_config.use_distributed_optimizer:
                _gather(chunk)
            model, _ = unwrap(chunk)
            for entry in entries_of(model, model.step35, _gradient):
                if hasattr(entry.parameter, "main_grad"):  # router biases have none
                    gradients |= {name: tensor.clone() for name, tensor in entry.save()}
    return gradients


def _gradient(parameter: Any) -> Tensor:
    # A copy: what is saved of an expanded gate is made equal in place.
    gradient: Tensor = parameter.main_grad
    return gradient.clone()


def _gather(chunk: Any) -> None:
    """Complete each bucket, of which the distributed optimizer leaves a rank one part."""
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            torch.distributed.all_gather(parts, own, group=group)
            bucket.grad_data.copy_(torch.cat(parts))
