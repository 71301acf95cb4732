"""Activations that are estimated, against what torch keeps and allocates on the CPU."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import implementation
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE
from support.ours import initialize_megatron, run
from support.reference import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.costs.activations import stage_bytes
from step35_patch.costs.estimate import peak_activations
from step35_patch.costs.launch import Launch, Stage, stages

pytestmark = pytest.mark.transformer_engine

TOKENS = 256
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": [*modules]}


# By the recomputation and what else is special. docs/estimate.md has what this finds.
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "none, fp32": {"bf16": False},
    "none, expanded gate": {"gate_layout": "expanded"},
    "full": FULL,
    "full, two layers": FULL | {"recompute_num_layers": 2, "mtp_num_layers": None},
    "block": FULL | {"recompute_method": "block", "recompute_num_layers": 2},
    "core_attn": selective("core_attn"),
    "mlp": selective("mlp"),
    "moe": selective("moe"),
    "shared_experts": selective("shared_experts"),
}
if ON_TRANSFORMER_ENGINE:
    # It needs names that Megatron-Core imports from Transformer Engine.
    MODES["layernorm"] = selective("layernorm")


def small_config() -> dict[str, Any]:
    """Wide enough that indices, which no published layer is made of, are few."""
    other = {"attention_type": "sliding_attention", "num_attention_heads": 12}
    return tiny_config(
        hidden_size=64,
        intermediate_size=176,
        moe_intermediate_size=56,
        vocab_size=160,
        num_attention_heads=8,
        attention_other_setting=other | {"num_attention_groups": 2, "head_dim": 16},
    )


@pytest.fixture(autouse=True, scope="module")
def _fused_attention():
    implementation.install(cudnn=True)
    initialize_megatron()


class Allocated(TorchDispatchMode):
    """Bytes of all storages that torch makes, those that are alive, and the most at a time."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        own += [p.grad for p in model.parameters() if p.grad is not None]
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.sizes: dict[int, int] = {}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known or key in self.sizes:
                continue
            self.sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.alive -= self.sizes.pop(key, 0)


def build(folder, **options: Any) -> torch.nn.Module:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()  # of the size of the last model's MTP layers
    (folder / "config.json").write_text(json.dumps(small_config()))
    provider = Step35ModelProvider.from_hf(
        folder,
        transformer_impl=IMPLEMENTATION,
        moe_grouped_gemm=ON_TRANSFORMER_ENGINE,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16 if options["bf16"] else torch.float32,
        **options,
    )
    return provider.provide().train()


def launch(bf16: bool = True, **options: Any) -> Launch:
    return Launch(
        num_layers=6,
        padded_vocab_size=160,
        mtp_num_layers=options.pop("mtp_num_layers", 2) or 0,
        seq_length=TOKENS,
        transformer_impl=IMPLEMENTATION,
        bias_swiglu_fusion=False,
        precision="bf16" if bf16 else "fp32",
        **options | {"recompute_modules": tuple(options.get("recompute_modules", ()))},
    )


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_within_a_tenth_of_what_torch_allocates(tmp_path, mode, record_property):
    """After the forward pass, and at the peak of both passes; of a second step.

    Not at the peak where kernels of Transformer Engine are stood in for, by more than they make.
    """
    options = {"bf16": True} | MODES[mode]
    model = build(tmp_path, **options)
    tokens = torch.randint(0, 159, (1, TOKENS))
    run(model, tokens, tokens).mean().backward()
    gc.collect()
    with Allocated(model) as allocated:
        loss = run(model, tokens, tokens).mean()
        after_forward = allocated.alive
        loss.backward()
    config, asked = Step35Config.from_dict(small_config()), launch(**options)
    kept = stage_bytes(config, asked, stages(asked)[0])
    off = {"forward": kept.forward / after_forward - 1}
    if not ON_TRANSFORMER_ENGINE:
        off["peak"] = kept.peak / allocated.peak - 1
    for name, value in off.items():
        record_property(name, f"{value:+.1%}")
    assert all(abs(value) < 0.1 for value in off.values()), off


def test_the_command_says_so(tmp_path, capsys):
    from step35_patch.cli import main

    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    words = ["estimate", str(tmp_path), "--seq-length", str(TOKENS), "--json"]
    assert main([*words, "--transformer-impl", IMPLEMENTATION, "--recompute", "moe"]) == 0
    [rank] = json.loads(capsys.readouterr().out)["ranks"]
    asked = launch(True, **MODES["moe"])
    if ON_TRANSFORMER_ENGINE:
        asked = replace(asked, bias_swiglu_fusion=True)  # as on a GPU
    config = Step35Config.from_dict(small_config())
    assert rank["bytes"]["activations"] == round(stage_bytes(config, asked, *stages(asked)).peak)


# --- By hand ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> Step35Config:
    from step35_patch.config import packaged_config_path

    return Step35Config.from_pretrained(packaged_config_path())


def of_published(**changes: Any) -> Launch:
    return Launch(
        **{"num_layers": 45, "padded_vocab_size": 128896, "mtp_num_layers": 3, "seq_length": 10}
        | changes
    )


def layer(config: Step35Config, index: int, **changes: Any) -> float:
    """Bytes of one layer, in bf16 on Transformer Engine."""
    stage = Stage(pp=0, decoder_layers=(index,)) if index < 45 else Stage(pp=0, mtp_layers=(index,))
    return stage_bytes(config, of_published(**changes), stage).forward


def test_a_layer_of_the_published_model(published):
    """Inputs and outputs of norms and matrix products, what attention gets, SwiGLU's parts."""
    queries, keys, hidden = 64 * 128, 8 * 128, 4096
    attention = 4 * queries + 3 * keys + 64  # and the gate's logits
    statistics = 4 * (64 + 64 + 8 + 2)  # softmax, norms of q and k, of the layer
    dense = 2 * (4 * hidden + attention + 3 * 11264) + statistics
    assert layer(published, 0) == 10 * dense
    copies = 8 * (2 * (hidden + 3 * 1280) + 4 + 8 + 8 + 4)
    router = 288 * 9 + 4
    moe = 2 * (4 * hidden + attention + 3 * 1280) + statistics + copies + router
    assert layer(published, 4) == 10 * moe
    # An MTP layer is a sliding one, with the inputs of three norms and of eh_proj besides.
    more = 2 * (4 * 32 * 128 + 32) + 4 * 2 * 32
    assert layer(published, 45) == 10 * (dense + more + 2 * 5 * hidden + 4 * 3)


def test_tensor_parallelism_divides_a_layers_activations(published):
    alone = layer(published, 1, seq_length=16)
    assert layer(published, 1, seq_length=16, tensor_model_parallel_size=8,
                 sequence_parallel=True) == alone / 8  # fmt: skip
    whole = layer(published, 1, seq_length=16, tensor_model_parallel_size=8)
    assert whole == alone / 8 + 16 * (4 * 4096 * 2 + 2 * 4) * 7 / 8
    assert layer(published, 1, seq_length=16, context_parallel_size=2) == alone / 2
    # Experts split by tensor parallelism each get the tokens of all ranks.
    tensor = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "seq_length": 16}
    split = layer(published, 4, **tensor, expert_tensor_parallel_size=8)
    assert split - layer(published, 4, **tensor) == 16 * 8 * 4096 * 2 * 7 / 8


def test_logits_are_kept_by_their_softmax(published):
    """In fp32, for each output matrix; Transformer Engine's loss keeps logits in their place."""
    last = Stage(pp=0, output=True)
    inputs, logits = 4 * 10 * 4096 * 2, 10 * 128896
    found = stage_bytes(published, of_published(), last)
    assert found.forward == inputs + 4 * logits * 4
    assert found.peak == found.forward + logits * 2
    fused = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}
    found = stage_bytes(published, of_published(**fused), last)
    assert found.forward == found.peak == inputs + 4 * logits * 2


def test_the_fullest_moment_of_a_schedule(published):
    """Each stage holds one micro-batch for itself and each stage behind it, the last its logits."""
    four = of_published(
        pipeline_model_parallel_size=4,
        pipeline_model_parallel_layout="Et*12|t*12|t*12|t*9mmmL",
        world_size=4,
        global_batch_size=16,
    )
    for pp, stage in enumerate(stages(four)):
        kept = stage_bytes(published, four, stage)
        expected = (3 - pp) * kept.forward + kept.peak
        assert peak_activations(published, four, (stage,)) == pytest.approx(expected)
        # With fewer micro-batches no more than there are.
        one = replace(four, global_batch_size=1)
        assert peak_activations(published, one, (stage,)) == pytest.approx(kept.peak)
