"""The gradients of a model in training, in the published layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from step35_patch.checkpoint import published_tensors_of


def published_gradients(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Every gradient by its published name, whole, as `finalize_model_grads` left it.

    Collective over the tensor-, expert- and data-parallel groups; each pipeline stage has its own
    layers' gradients, the one with the MTP layers those of its copy of the embedding besides.

    Args:
        chunks: the model chunks of this rank, each in Megatron-Core's DistributedDataParallel.

    Returns:
        Copies, in the published shapes and the dtype of `main_grad`. Router biases have none.
    """
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            _gather(chunk)
    with torch.no_grad(), _as_weights(chunks):
        return {
            name: tensor.clone()
            for name, tensor in published_tensors_of(chunks)
            if not name.endswith("router_bias")
        }


@contextmanager
def _as_weights(chunks: Sequence[Any]) -> Iterator[None]:
    """Let each parameter's data be its gradient."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            # A copy: what is published of an expanded gate is made equal in place.
            parameter.data = parameter.main_grad.clone()
        yield
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _gather(chunk: Any) -> None:
    """Complete each bucket, of which the distributed optimizer leaves a rank one part."""
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            torch.distributed.all_gather(parts, own, group=group)
            bucket.grad_data.copy_(torch.cat(parts))
