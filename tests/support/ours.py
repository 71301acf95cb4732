"""The package's side of the parity tests: a Step-3.5 GPTModel in this process, on the CPU."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from step35_patch import Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights, published_tensors_of
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE


def initialize_megatron(world_size: int = 1, **sizes: int) -> None:
    """torch.distributed (gloo), once in a process, and Megatron-Core's groups where it has none."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        return
    if torch.distributed.is_initialized():
        pass  # of a layout before
    elif world_size == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**sizes)
    # Transformer Engine's modules and recomputation ask for its generators.
    model_parallel_cuda_manual_seed(1234)


def build(hf_dir: Path, **overrides) -> torch.nn.Module:
    """A GPTModel on the CPU with the weights of a folder, on the implementation that is tested."""
    initialize_megatron()
    options = {
        "transformer_impl": IMPLEMENTATION,
        "moe_grouped_gemm": ON_TRANSFORMER_ENGINE,
        "use_cpu_initialization": True,
    }
    provider = Step35ModelProvider.from_hf(hf_dir, **(options | overrides))
    model = provider.provide()
    load_hf_weights(model, hf_dir)
    return model


def make_optimizer(config: Any, chunks: list[torch.nn.Module], **options: Any) -> Any:
    """As megatron.training makes it: before Megatron-Core 0.18, Muon has a function of its own.

    Args:
        config: an OptimizerConfig.
        chunks: of the model, in DistributedDataParallel.
        options: more arguments of Megatron-Core's functions.
    """
    from megatron.core.optimizer import get_megatron_optimizer, muon

    of_its_own = "model_chunks" in inspect.signature(muon.get_megatron_muon_optimizer).parameters
    if "muon" not in config.optimizer or not of_its_own:
        return get_megatron_optimizer(config, chunks, **options)
    layer_wise = {"layer_wise_distributed_optimizer": "dist" in config.optimizer}
    return muon.get_megatron_muon_optimizer(config, chunks, **layer_wise, **options)


def run(
    model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [b, s, vocabulary], or with labels the loss of each token [b, s]."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return model(input_ids, positions, None, labels=labels)


def published_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters' gradients in the published names, by way of the package's own export map."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for parameter in parameters:
            parameter.data, parameter.grad = parameter.grad, parameter.data
        try:
            return {
                name: tensor.clone()
                for name, tensor in published_tensors_of(model)
                if not name.endswith("router_bias")
            }
        finally:
            for parameter in parameters:
                parameter.data, parameter.grad = parameter.grad, parameter.data
