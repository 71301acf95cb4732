"""One rank of tests/frameworks/test_trainers.py: a trainer's own code sends the weights."""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

import step35_patch
from step35_patch.checkpoint import load_hf_weights, published_tensors_of
from step35_patch.frameworks import WholeTensors, slime_init
from support.distributed_worker import build_chunks


class Wrapped(torch.nn.Module):
    """A model chunk as trainers have it: in a wrapper, whose part of the names they count on."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module, self.config = module, module.config


def import_around(paths: str, package: str, module: str, *left_out: str) -> Any:
    """A module of a checkout, without its package's own imports or those of some of its modules.

    Args:
        paths: of the checkout, and of what it imports.
        package: whose `__init__` is left out, as it imports the whole trainer.
        module: to be imported.
        left_out: modules in whose place there is an empty one, for what only runs on a GPU.
    """
    checkout, *imports = paths.split(os.pathsep)
    sys.path += imports
    top = types.ModuleType(package)
    top.__path__ = [str(Path(checkout, package))]
    sys.modules[package] = top
    for name in left_out:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda attribute: type(attribute, (), {})
    return importlib.import_module(module)


def _setup(hf_dir: str, layout: str) -> tuple[list[torch.nn.Module], Any]:
    options = json.loads(layout)
    step35_patch.activate(hf_dir, gate_layout=options.get("gate_layout"))
    chunks = build_chunks(Path(hf_dir), options)
    load_hf_weights(chunks, hf_dir)
    for chunk in chunks:  # as Megatron's get_model does
        from megatron.core.tensor_parallel import (
            set_defaults_if_not_set_tensor_model_parallel_attributes as set_defaults,
        )

        for parameter in chunk.parameters():
            set_defaults(parameter)
    config = chunks[0].config
    args = types.SimpleNamespace(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        expert_model_parallel_size=config.expert_model_parallel_size,
        vocab_size=config.step35.config.vocab_size,
        update_weight_buffer_size=2**12,
        q_lora_rank=None,
    )
    return chunks, args


def _compare(sent: dict[str, torch.Tensor], chunks: list[torch.nn.Module], wanted: set) -> None:
    """Every tensor, as the package's own gathering has it."""
    assert set(sent) == wanted, set(sent) ^ wanted
    for name, tensor in published_tensors_of(chunks, every_stage=True):
        if name in wanted:
            assert torch.equal(sent[name], tensor), name
    sys.stdout.write(f"rank {os.environ['RANK']}: {len(sent)} sent\n")
    sys.stdout.flush()


def slime(paths: str, hf_dir: str, layout: str) -> None:
    """slime's iterator over the published tensors, which gathers over all groups."""
    base = "slime.backends.megatron_utils"
    # Of sglang it needs what shares GPU memory between processes.
    direct = import_around(
        paths, "slime", f"{base}.update_weight.hf_weight_iterator_direct", f"{base}.sglang"
    )
    common = importlib.import_module(f"{base}.update_weight.common")
    chunks, args = _setup(hf_dir, layout)
    importlib.import_module("slime.utils.distributed_utils").init_gloo_group()
    slime_init(args)
    wrapped = [Wrapped(chunk) for chunk in chunks]
    iterator = direct.HfWeightIteratorDirect(args, wrapped, "step3p5config", None)
    local = dict(common.named_params_and_buffers(args, wrapped))
    pairs = [pair for chunk in iterator.get_hf_weight_chunks(local) for pair in chunk]
    assert len(pairs) == len(dict(pairs))
    assert len(iterator.megatron_local_param_info_buckets) > 1
    wanted = {name for name, _ in published_tensors_of(chunks, every_stage=True)}
    _compare(dict(pairs), chunks, wanted)


def areal(paths: str, hf_dir: str, layout: str) -> None:
    """AReaL's names and gathering of one stage's weights, and its choice of what converts them."""
    base = "areal.engine.megatron_utils"
    megatron = import_around(
        paths, "areal", f"{base}.megatron", f"{base}.fp8", f"{base}.megatron_lora"
    )
    chunks, args = _setup(hf_dir, layout)
    whole = WholeTensors(chunks[0].config)
    # docs/frameworks.md
    megatron._CONVERSION_FN_REGISTRY["step3p5"] = lambda config, name, tensor: whole(name, tensor)
    pairs = []
    with torch.no_grad():
        wrapped = [Wrapped(chunk) for chunk in chunks]
        for name, parameter in megatron.get_named_parameters(wrapped, args.num_experts):
            gathered = megatron.all_gather_param(
                name, parameter, gated_linear_unit="linear_fc1" in name
            )
            gathered = megatron.remove_padding(name, gathered, args.vocab_size)
            pairs += megatron.convert_to_hf(chunks[0].config, "step3p5", name, gathered)
    assert len(pairs) == len(dict(pairs))
    _compare(dict(pairs), chunks, {name for name, _ in published_tensors_of(chunks)})
