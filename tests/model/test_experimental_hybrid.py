"""Step-3.5 as a HybridModel: the reference's numbers, and a GPTModel's bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core.models.hybrid", reason="0.17 has no HybridModel")

from megatron.core import dist_checkpointing
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from support import hybrid, ours
from support.implementation import IMPLEMENTATION
from support.parity import compare
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

from step35_patch import Step35ModelProvider
from step35_patch.model.experimental_hybrid import Step35HybridModel

pytestmark = pytest.mark.transformer_engine

CONFIG, SEED, LENGTH = tiny_config(), 1, 3 * WINDOW + 1
# A letter for the attention of each layer and one for its MLP, of which two are dense.
PATTERN = "*-*-*E*E*E*E/*-/*-"
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG, SEED)


@pytest.fixture(scope="module")
def hf_folder(weights, tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), CONFIG, weights)


def test_parity(hf_folder, weights):
    model = hybrid.build(hf_folder)
    assert model.hybrid_layer_pattern == PATTERN
    compare(model, Reference(CONFIG, weights), SEED, LENGTH)


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
def test_numbers_and_checkpoint_are_a_gpt_model_s(hf_folder, tmp_path, gate_layout):
    """Logits, losses, gradients, and the weights that a GPTModel saved in Megatron's format."""
    gpt, model = (x.build(hf_folder, gate_layout=gate_layout) for x in (ours, hybrid))
    dist_checkpointing.save(gpt.sharded_state_dict(), str(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    state = dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path))
    model.load_state_dict(state, strict=True)

    tokens, labels = random_tokens(SEED, 2, LENGTH)
    found = []
    for built in (gpt, model):
        built.train()
        losses = ours.run(built, tokens, labels)
        losses.mean().backward()
        found.append(
            {"logits": ours.run(built, tokens), "losses": losses, **ours.published_gradients(built)}
        )
    expected, same = found
    assert set(same) == set(expected)
    assert [name for name in expected if not torch.equal(same[name], expected[name])] == []


@pytest.mark.parametrize(
    ("pattern", "options", "problem"),
    [
        pytest.param("*|-*-*E*E*E*E/*-/*-", PP2, "layer_pattern: expected '", id="within a layer"),
        pytest.param("*-*E*E*E*E*E/*-/*-", {}, "layer_pattern: expected '", id="MoE for dense"),
        pytest.param("*-*-*E*E*E*E", {}, "layer_pattern: expected '", id="without MTP layers"),
        pytest.param(PATTERN, PP2, "layer_pattern: expected 2 stages", id="one stage of two"),
        pytest.param(PATTERN, {"first_last_layers_bf16": True}, "first_last_layers", id="bf16"),
    ],
)
def test_what_is_refused(hf_folder, pattern, options, problem):
    provider = Step35ModelProvider.from_hf(hf_folder, transformer_impl="local", **options)
    with pytest.raises(ValueError, match=f"Step35HybridModel:\n  .*{problem}"):
        Step35HybridModel(
            provider,
            vocab_size=provider.vocab_size,
            max_sequence_length=provider.max_position_embeddings,
            hybrid_layer_pattern=pattern,
        )


def test_megatrons_own_layers_are_refused(hf_folder):
    """They would build, and be another model."""
    provider = Step35ModelProvider.from_hf(hf_folder, transformer_impl=IMPLEMENTATION)
    with pytest.raises(NotImplementedError, match="HybridModel: expected a GPTModel"):
        HybridModel(provider, hybrid_stack_spec, 96, 256, hybrid_layer_pattern=PATTERN)


@pytest.mark.transformer_engine(only=True)
def test_another_model_is_built_as_before():
    ours.initialize_megatron()
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True
    )
    model = HybridModel(config, hybrid_stack_spec, 96, 256, hybrid_layer_pattern="*-")
    assert [type(layer) for layer in model.decoder.layers] == [TransformerLayer, MLPLayer]
