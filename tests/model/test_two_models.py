"""Several models in one process: each computes what it computes alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE
from support.ours import build, initialize_megatron, run
from support.parity import FEATURES, compare
from support.reference import Reference, random_tokens, random_weights, tiny_config, write_hf_folder

import step35_patch

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

# After step35_patch: megatron is imported by it.
from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

# More MTP layers than the other, and another window, gate, clamps and RoPE.
OTHER = {
    **FEATURES["three MTP layers"],
    "sliding_window": 5,
    "use_head_wise_attn_gate": False,
    "swiglu_limits": None,
    "rope_scaling": None,
}


def model_of(tmp_path, config: dict, seed: int, **options):
    weights = random_weights(config, seed)
    folder = write_hf_folder(tmp_path / f"hf {seed}", config, weights)
    return build(folder, **options), Reference(config, weights)


def stock_model() -> GPTModel:
    """Another architecture's, of the same size and depth as the tiny config."""
    initialize_megatron()
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=6,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=4,
        transformer_impl=IMPLEMENTATION,
        use_cpu_initialization=True,
    )
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=ON_TRANSFORMER_ENGINE, normalization="RMSNorm"
    )
    return GPTModel(
        config,
        spec,
        vocab_size=96,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def test_two_configs_alive_at_once(tmp_path):
    """Used in turn; the later one has more MTP layers, whose losses Megatron logs for a process."""
    first = model_of(tmp_path, tiny_config(), 11)
    compare(*first, seed=11, length=30)
    second = model_of(tmp_path, tiny_config(**OTHER), 12)
    for (model, reference), seed in ((second, 12), (first, 13), (second, 14)):
        for parameter in model.parameters():
            parameter.grad = None
        for parameter in reference.parameters.values():
            parameter.grad = None
        compare(model, reference, seed=seed, length=30)


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours second"])
def test_another_architecture_beside_it(tmp_path, ours_first):
    tokens = random_tokens(17, 1, 24)[0]
    step35_patch.deactivate()
    try:
        stock = stock_model()
        wanted = run(stock.eval(), tokens)
    finally:
        step35_patch.activate()
    ours = model_of(tmp_path, tiny_config(), 17) if ours_first else None
    other = stock_model().eval()
    model, reference = ours or model_of(tmp_path, tiny_config(), 17)
    compare(model, reference, seed=17, length=30)
    assert {type(layer) for layer in other.decoder.layers} == {TransformerLayer}
    assert str(other) == str(stock)
    assert torch.equal(run(other, tokens), wanted)
    # A model that was built before the package was active is left alone by its wrappers.
    assert torch.equal(run(stock, tokens), wanted)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_built_layers_are_copied_no_worse_than_stock_ones(tmp_path, way):
    """They hold process groups, which nothing can copy."""
    model, _ = model_of(tmp_path, tiny_config(), 16)
    for layers in (stock_model().decoder.layers, model.decoder.layers):
        with pytest.raises(TypeError, match=r"cannot pickle 'torch\._C\."):
            way(layers[1])
