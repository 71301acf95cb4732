"""The provider: made by hand or from a config, and changed later on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.ours import build, initialize_megatron, run
from support.parity import compare
from support.reference import Reference, random_tokens, random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights
from step35_patch.model.description import runtime_for
from step35_patch.model.layer import layer_config
from step35_patch.model.megatron_fields import FIELDS, model_fields

pytestmark = pytest.mark.megatron

from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402


@pytest.fixture
def published(tmp_path):
    """The tiny config, its weights, and the folder with them."""
    initialize_megatron()
    config = tiny_config()
    weights = random_weights(config, 31)
    return config, weights, write_hf_folder(tmp_path / "hf", config, weights)


def test_provider_made_by_hand_equals_the_one_from_the_config(published):
    config, weights, folder = published
    initialize_megatron()
    names = ("layer_types", "swiglu_limits", "swiglu_limits_shared", "partial_rotary_factors")
    provider = Step35ModelProvider(
        **model_fields(Step35Config.from_dict(config)),
        **{name: config[name] for name in names},
        attention_other_setting=config["attention_other_setting"],
        sliding_attention_setting={"sliding_window": config["sliding_window"]},
        rotary_base_per_layer=config["rope_theta"],
        rope_scaling=config["rope_scaling"],
        yarn_only_types=config["yarn_only_types"],
        vocab_size=96,
        max_position_embeddings=256,
        transformer_impl="local",
        use_cpu_initialization=True,
    )
    assert provider.step35.config.fingerprint == Step35Config.from_dict(config).fingerprint
    model = provider.provide()
    load_hf_weights(model, folder)
    compare(model, Reference(config, weights), seed=31, length=30)


# As frameworks set them: what the config decides, what the package adds, and what is the user's.
SET_LATER = {
    "layernorm_epsilon": 1e-6,
    "moe_router_topk": 1,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_score_function": "softmax",
    "moe_layer_freq": [0, 1, 1, 1, 1, 1],
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "qk_layernorm": False,
    "normalization": "LayerNorm",
    "mtp_num_layers": 1,
    "layer_types": ["full_attention"] * 8,
    "attention_other_setting": {"num_attention_heads": 2, "num_attention_groups": 2},
    "sliding_attention_setting": {"sliding_window": 3},
    "rotary_base_per_layer": 500.0,
    "swiglu_limits": [1.0] * 8,
    "head_wise_attn_gate": False,
    "vocab_size": 128,
    "gate_layout": "expanded",
    "window": "steptron",
    "padded_logits": "kept",
    "softmax_scale": 0.5,
    "moe_router_num_groups": 2,
    "hidden_dropout": 0.1,
    "init_method_std": 0.5,
    "params_dtype": torch.bfloat16,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_layout": "Et*6|mmL",
}


def outcome(make):
    """A provider's model and fields, or the words of its refusal."""
    try:
        provider = make()
        runtime = runtime_for(provider)
    except (ValueError, AssertionError) as error:
        return str(error)
    fields = {
        field.name: repr(getattr(provider, field.name))
        for field in dataclasses.fields(provider)
        if not callable(getattr(provider, field.name))
    }
    std = provider.init_method(torch.zeros(1000)).std().round(decimals=1)
    return runtime, fields, std


@pytest.mark.parametrize("name", SET_LATER)
def test_field_set_later_is_as_one_given_to_the_constructor(published, name):
    value = SET_LATER[name]

    def set_later():
        provider = Step35ModelProvider.from_hf(published[2])
        before = runtime_for(provider)
        assert before == provider.step35
        setattr(provider, name, value)
        return provider

    later = outcome(set_later)
    assert later == outcome(lambda: Step35ModelProvider.from_hf(published[2], **{name: value}))
    assert later != outcome(lambda: Step35ModelProvider.from_hf(published[2]))
    if isinstance(later, str):
        assert name in later.replace("-", "_")


def test_entry_of_a_list_set_later_is_seen(published):
    provider = Step35ModelProvider.from_hf(published[2])
    provider.swiglu_limits[3] = 0.5
    with pytest.raises(ValueError, match="swiglu_limits"):
        gpt_layer_specs.get_gpt_decoder_block_spec(provider, use_transformer_engine=False)


def test_model_stays_what_it_was_built_as(published):
    """A field that is set once a model is built is for the next one."""
    config, weights, folder = published
    model = build(folder)
    model.config.window = "steptron"
    model.config.rotary_base_per_layer = 1.0
    load_hf_weights(model, folder)
    compare(model, Reference(config, weights), seed=31, length=30)


def test_provider_made_by_hand_refuses_another_model_s_values():
    with pytest.raises(ValueError, match="moe_router_dtype: expected 'fp32'") as error:
        Step35ModelProvider(
            num_layers=1,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            num_moe_experts=4,
            moe_ffn_hidden_size=16,
            moe_shared_expert_intermediate_size=16,
            moe_router_topk=2,
            moe_router_topk_scaling_factor=3.0,
            moe_router_dtype="fp64",
            normalization="rmsnorm",
            layer_types=["full_attention"],
            rotary_base_per_layer=1e4,
            vocab_size=96,
            max_position_embeddings=256,
        )
    assert "normalization: expected 'RMSNorm', found 'rmsnorm'" in str(error.value)


def test_provider_refuses_what_contradicts_its_config(published):
    with pytest.raises(ValueError, match="num_attention_heads: the config needs 4"):
        Step35ModelProvider.from_hf(published[2], num_attention_heads=8)
    with pytest.raises(ValueError, match="mtp_num_layers: the config needs 2"):
        Step35ModelProvider.from_hf(published[2], mtp_num_layers=3)
    with pytest.raises(ValueError, match="layer_types"):
        Step35ModelProvider.from_hf(published[2], layer_types=["full_attention"] * 8)
    with pytest.raises(ValueError, match="gate_layout"):
        Step35ModelProvider.from_hf(published[2], gate_layout="sideways")
    with pytest.raises(ValueError, match="padded_logits: expected 'masked' or 'kept', found 'no'"):
        Step35ModelProvider.from_hf(published[2], padded_logits="no")


@pytest.mark.parametrize("options", [{}, {"moe_router_bias_update_rate": 1e-3}])
def test_published_router_bias_stays_unless_a_rate_is_given(published, options):
    """Megatron-Core moves it after each iteration, whatever the learning rate."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    model = build(published[2], **options)
    tokens, _ = random_tokens(3, 2, 30)
    before = run(model, tokens).detach()
    for _ in range(30):
        run(model, tokens)
        _update_router_expert_bias([model], model.config)
    off = (run(model, tokens) - before).abs().max().item()
    assert off > 1 if options else off == 0


def test_each_layer_communicates_in_its_own_way(published):
    """MTP layers, which Megatron-Core numbers from 1, have the last sliding layer's."""
    kinds = ["p2p", "a2a", "all_gather", "a2a", "p2p", "all_gather"]
    provider = Step35ModelProvider.from_hf(published[2], cp_comm_type=kinds)
    layers = provider.hf_config.layers
    found = [layer_config(provider, provider.step35, plan).cp_comm_type for plan in layers]
    assert found == [*kinds, "all_gather", "all_gather"]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (None, "with a sliding window, .* found p2p in 1-3,5-7"),
        ("p2p", "with a sliding window, .* found p2p in 1-3,5-7"),
        (["p2p", "a2a", "p2p", "a2a", "p2p", "a2a"], "found p2p in 2; give"),
        ("a2a", "tensor x context parallel size = 1 x 4, .* use all_gather there"),
    ],
)
def test_what_transformer_engine_cannot_send_is_refused(published, kinds, message):
    """Before anything is built; Transformer Engine would raise in the first step."""
    provider = Step35ModelProvider.from_hf(
        published[2],
        transformer_impl="transformer_engine",
        context_parallel_size=4,
        cp_comm_type=kinds,
    )
    with pytest.raises(ValueError, match=message):
        provider.provide()


def test_detached_heads_are_refused(tmp_path):
    folder = write_hf_folder(tmp_path, tiny_config(), {})
    if "mtp_detach_heads" not in Step35ModelProvider.__dataclass_fields__:
        pytest.skip("mtp_detach_heads is not in this Megatron-Core")
    with pytest.raises(ValueError, match=r"mtp_detach_heads: expected False, .* one for each"):
        Step35ModelProvider.from_hf(folder, mtp_detach_heads=True)


def test_virtual_pipeline_of_two_stages_needs_overlap(published):
    """Megatron-Core's own arguments refuse it; gradients would be off by a factor of thousand."""
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}
    stages["pipeline_dtype"] = torch.float32
    with pytest.raises(ValueError, match=r"overlap_p2p_comm: expected True \(and batch_p2p_comm"):
        Step35ModelProvider.from_hf(published[2], **stages)
    Step35ModelProvider.from_hf(published[2], **stages, overlap_p2p_comm=True, batch_p2p_comm=False)


def test_two_copies_of_the_embedding_on_a_rank_are_refused(published):
    """The second copy's gradients would be left out of the first one's."""
    with pytest.raises(ValueError, match=r"pipeline rank 0 in its virtual stage 0 .* in \[0, 1\]"):
        Step35ModelProvider.from_hf(
            published[2],
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Ettt|ttt|mm|L",
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("Ett|tt|tt|mmL", [4, 7]),
        ("Ett|tttt|mm|L", [4, 6]),
        ("Ett|tt|tt|||mm||L", [4, 5]),
    ],
)
def test_embedding_ranks_are_where_the_copies_are(published, layout, ranks):
    chunks = layout.count("|") + 1
    provider = Step35ModelProvider.from_hf(
        published[2],
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=chunks // 4 if chunks > 4 else None,
        pipeline_model_parallel_layout=layout,
        pipeline_dtype=torch.float32,
    )
    assert provider.embedding_ranks([4, 5, 6, 7]) == ranks


def test_provider_has_the_defaults_of_the_table():
    defaults = Step35ModelProvider.__dataclass_fields__
    rows = [row for row in FIELDS if row.is_default and row.hf is None]
    assert rows
    for row in rows:
        assert defaults[row.megatron].default == row.value
