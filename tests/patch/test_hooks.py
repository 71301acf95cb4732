"""With a config active the builders and GPTModel make Step-3.5, and other models as before."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.ours import build, initialize_megatron, run
from support.parity import compare
from support.reference import Reference, random_tokens, random_weights, tiny_config, write_hf_folder

import step35_patch
from step35_patch import Step35Config, Step35DecoderLayer, Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights
from step35_patch.model.megatron_fields import FIELDS, model_fields
from step35_patch.model.swiglu import ClampedSwiGLU

pytestmark = pytest.mark.megatron

# After step35_patch: megatron is imported by it.
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402


@pytest.fixture
def active(tmp_path):
    """The tiny config, active in the process; the folder with its weights."""
    initialize_megatron()
    config = tiny_config()
    weights = random_weights(config, 31)
    folder = write_hf_folder(tmp_path / "hf", config, weights)
    step35_patch.activate(folder)
    yield config, weights, folder
    step35_patch.activate()  # inert again: no STEP35_CONFIG in the tests


def hand_made(config: dict, **changes) -> TransformerConfig:
    """A plain TransformerConfig of the config's shape, as a user's own script would make it."""
    fields = model_fields(Step35Config.from_dict(config)) | {
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        **{row.megatron: row.value for row in FIELDS if row.is_default and row.hf is None},
    }
    return TransformerConfig(**(fields | changes))


def other_model() -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=2,
        transformer_impl="local",
        use_cpu_initialization=True,
    )


def gpt_model(config: TransformerConfig, spec, mtp_spec=None, **options) -> GPTModel:
    return GPTModel(
        config,
        spec,
        vocab_size=96,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_spec,
        **options,
    )


def specs(config: TransformerConfig):
    """As Megatron-LM's gpt_builders.py makes them."""
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
        config, spec.layer_specs[-1], use_transformer_engine=False
    )
    return spec, mtp_spec


def test_hand_made_config_of_the_active_shape_becomes_the_model(active):
    config, weights, folder = active
    transformer_config = hand_made(config)
    before = dict(vars(transformer_config))
    before["moe_layer_freq"] = list(before["moe_layer_freq"])
    model = gpt_model(transformer_config, *specs(transformer_config))
    load_hf_weights(model, folder)
    compare(model, Reference(config, weights), seed=31, length=30)
    after = vars(transformer_config)
    changed = {name for name in after if name not in before or after[name] != before[name]}
    # Set by Megatron-Core's own TransformerBlock.
    assert changed <= {"_cpu_offloading_context"}


def test_another_config_activated_later_leaves_the_first_model_alone(active, tmp_path):
    """Also one of the same number of layers and hidden size, by which configs are recognised."""
    models = []
    for seed, config in ((31, active[0]), (32, tiny_config(sliding_window=5, swiglu_limits=None))):
        weights = random_weights(config, seed)
        folder = write_hf_folder(tmp_path / f"hf {seed}", config, weights)
        step35_patch.activate(folder)
        transformer_config = hand_made(config)
        model = gpt_model(transformer_config, *specs(transformer_config))
        load_hf_weights(model, folder)
        models.append((model, Reference(config, weights), seed))
    for model, reference, seed in models:
        compare(model, reference, seed=seed, length=30)


def test_other_model_is_built_as_before(active):
    config = other_model()
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    stock = inspect.unwrap(gpt_layer_specs.get_gpt_decoder_block_spec)(
        config, use_transformer_engine=False
    )
    assert repr(spec) == repr(stock)
    model = gpt_model(config, spec)
    assert {type(layer) for layer in model.decoder.layers} == {TransformerLayer}
    assert not hasattr(model, "mtp_output_heads")
    assert model.position_embedding_type == "rope"


def test_nothing_is_exchanged_without_a_config(active):
    config = hand_made(active[0], layernorm_zero_centered_gamma=False)
    step35_patch.activate()
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    assert {layer.module for layer in spec.layer_specs} == {TransformerLayer}


def test_contradictions_are_listed_together(active):
    config = hand_made(active[0], num_query_groups=4, moe_router_topk=1, ffn_hidden_size=64)
    with pytest.raises(ValueError, match="num_query_groups") as error:
        gpt_layer_specs.get_gpt_decoder_layer_specs(config, use_transformer_engine=False)
    for line in (
        "num_query_groups: the config needs 2, the TransformerConfig has 4",
        "moe_router_topk: the config needs 2, the TransformerConfig has 1",
        "ffn_hidden_size: the config needs 48, the TransformerConfig has 64",
    ):
        assert line in str(error.value)


def test_mtp_layers_are_dense_whatever_spec_comes_in(active):
    """With no decoder layer on the last stage Megatron-LM hands over a stock spec, MoE or dense."""
    config, weights, folder = active
    transformer_config = hand_made(config)
    spec, _ = specs(transformer_config)
    for experts in (None, config["moe_num_experts"]):
        stock = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=True)
        mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
            transformer_config, stock, use_transformer_engine=False
        )
        model = gpt_model(transformer_config, spec, mtp_spec)
        assert [mtp.mtp_model_layer.plan.index for mtp in model.mtp.layers] == [6, 7]
        load_hf_weights(model, folder)
    compare(model, Reference(config, weights), seed=31, length=30)


def test_single_layer_spec_becomes_the_block(active):
    config, _, folder = active
    transformer_config = hand_made(config, mtp_num_layers=2)
    single = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=4, qk_layernorm=True, normalization="RMSNorm"
    )
    model = gpt_model(transformer_config, single, specs(transformer_config)[1])
    load_hf_weights(model, folder)
    assert [layer.plan.is_moe for layer in model.decoder.layers] == [False] * 2 + [True] * 4
    input_ids, _ = random_tokens(31, 1, 20)
    assert torch.equal(run(model, input_ids), run(build(folder), input_ids))


def test_stock_layer_inside_the_model_is_an_error(active):
    transformer_config = hand_made(active[0])
    spec, _ = specs(transformer_config)
    builder = inspect.unwrap(gpt_layer_specs.get_gpt_mtp_block_spec_for_backend)
    stock = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=None, qk_layernorm=True)
    plain = dict.fromkeys(("layernorm_zero_centered_gamma", "persist_layer_norm"), False)
    for name, value in plain.items():
        setattr(transformer_config, name, value)
    mtp_spec = builder(transformer_config, stock, LocalSpecProvider())
    # The MTP layer's stock norms refuse a zero-centred gamma before the check is reached.
    transformer_config.layernorm_zero_centered_gamma = True
    with pytest.raises(Exception, match=r"zero_centered_gamma|stock TransformerLayer"):
        gpt_model(transformer_config, spec, mtp_spec)


def test_check_names_each_module_that_is_wrong(active):
    from step35_patch.patch.built_model import check_model

    model = build(active[2])
    runtime = model.config.step35
    check_model(model, runtime)
    routed = model.decoder.layers[3].mlp.experts.local_experts[1]
    routed.activation_func = ClampedSwiGLU(None)
    model.decoder.layers[4].__class__ = TransformerLayer
    with pytest.raises(RuntimeError) as error:
        check_model(model, runtime)
    assert "decoder.layers.3: experts clamps at None, expected 0.3" in str(error.value)
    assert "decoder.layers.4: a stock TransformerLayer" in str(error.value)


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ({"share_embeddings_and_output_weights": True}, "share_embeddings_and_output_weights"),
        ({"vocab_size": 90}, "vocab_size: expected at least 96, found 90"),
        ({"rope_scaling": True}, "rope_scaling: expected False"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
    ],
)
def test_model_arguments_that_make_another_model_are_errors(active, option, found):
    config = hand_made(active[0])
    spec, mtp_spec = specs(config)
    arguments = {
        "vocab_size": 96,
        "max_sequence_length": 64,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    with pytest.raises(ValueError, match=found):
        GPTModel(config, spec, mtp_block_spec=mtp_spec, **(arguments | option))


@pytest.mark.parametrize(
    "option",
    [
        {"window_size": (4, 0)},
        {"qk_clip": True},
        {"rotary_interleaved": True},
        {"activation_func_clamp_value": 7.0},
        {"no_rope_freq": [0, 0, 0, 1, 0, 0]},
        {"cross_entropy_fusion_impl": "linear"},
    ],
)
def test_options_that_bypass_the_layer_are_errors(active, option):
    [(name, _)] = option.items()
    with pytest.raises(Exception, match=name):
        build(active[2], **option)


def test_layer_index_of_every_kind(active):
    transformer_config = hand_made(active[0])
    dense, *_ = gpt_layer_specs.get_gpt_decoder_layer_specs(
        transformer_config, use_transformer_engine=False, normalization="RMSNorm"
    )

    def layer(**where) -> Step35DecoderLayer:
        return Step35DecoderLayer(transformer_config, dense.submodules, **where)

    assert layer(layer_number=2).plan.index == 1
    assert layer(layer_number=2, add_layer_offset=False).plan.index == 1
    assert layer(layer_number=2, is_mtp_layer=True).plan.index == 7
    for where in (
        {"layer_number": 0},
        {"layer_number": 7},
        {"layer_number": 3, "is_mtp_layer": True},
        {"layer_number": 0, "is_mtp_layer": True},
    ):
        with pytest.raises(IndexError, match="expected"):
            layer(**where)
    with pytest.raises(ValueError, match="the config has MoE there"):
        layer(layer_number=4)
    with pytest.raises(ValueError, match=r"no Step-3.5 model"):
        Step35DecoderLayer(other_model(), dense.submodules)


def start_lines(active, capsys, **fields) -> list[str]:
    """What is printed when a model of two chunks is built."""
    from step35_patch.patch import built_model

    built_model._print_once.cache_clear()
    config = hand_made(active[0], **fields)
    model_specs = specs(config)
    gpt_model(config, *model_specs)
    gpt_model(config, *model_specs)
    return [line for line in capsys.readouterr().out.splitlines() if "step35_patch" in line]


def test_one_line_says_what_is_built(active, capsys):
    (line,) = start_lines(active, capsys)
    assert f"config {active[2]}" in line
    assert "gate headwise, window hf, 2 full + 4 sliding layers, 4 MoE, 2 MTP, router bias" in line


def test_one_more_line_says_what_is_not_as_published(active, capsys):
    changed = {
        "hidden_dropout": 0.1,
        "moe_router_bias_update_rate": 1e-3,
        "moe_expert_capacity_factor": 1.0,
        "moe_input_jitter_eps": 0.01,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "moe_z_loss_coeff": 1e-3,
        "mtp_num_layers": 1,
    }
    _, line = start_lines(active, capsys, **changed)
    assert line.startswith("step35_patch: differs from the published model: hidden_dropout=0.1 ")
    for name in changed.keys() - {"moe_router_load_balancing_type"}:
        assert f"{name}={changed[name]!r} (published: " in line
    assert line.count("(published: ") == 7


def test_copy_of_the_embedding_is_marked_as_one(active):
    """Of a stage with MTP layers; 0.17.1 marks the first stage's only, and optimizers read it."""
    options = {"transformer_impl": "local", "use_cpu_initialization": True}
    model = Step35ModelProvider.from_hf(active[2], **options).provide(pre_process=False)
    assert model.embedding.word_embeddings.weight.is_embedding_or_output_parameter


def test_provider_says_when_the_package_is_off(active):
    provider = Step35ModelProvider.from_hf(active[2], transformer_impl="local")
    step35_patch.deactivate()
    try:
        with pytest.raises(RuntimeError, match="activate"):
            provider.provide()
    finally:
        step35_patch.activate()
