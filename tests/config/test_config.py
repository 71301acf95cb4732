"""A legal config.json, in any of its spellings, becomes one immutable table of layers."""

import copy
import json
import pickle
import random
import warnings

import pytest
from support.config_samples import (
    FULL,
    PER_LAYER,
    SLIDING,
    edited,
    problems_of,
    published,
    resaved,
    tiny,
)

from step35_patch.config import Step35Config, Step35ConfigError, packaged_config_path
from step35_patch.config.layer_plan import LayerPlan, RopeScaling

# --- the published config ---------------------------------------------------------------------


def test_the_published_config_resolves_to_the_published_layers():
    layers = Step35Config.from_pretrained(packaged_config_path()).layers
    scaling = RopeScaling("llama3", 2.0, 1.0, 32.0, 131072)
    assert len(layers) == 48
    for index, plan in enumerate(layers):
        full = index % 4 == 0 and index < 45
        limited = index in (43, 44)
        assert plan == LayerPlan(
            index=index,
            is_mtp=index >= 45,
            is_moe=3 <= index <= 44,
            attention_type=FULL if full else SLIDING,
            num_attention_heads=64 if full else 96,
            num_query_groups=8,
            kv_channels=128,
            window_size=None if full else (511, 0),
            rotary_base=5e6 if full else 1e4,
            rotary_percent=0.5 if full else 1.0,
            rope_scaling=scaling if full else None,
            swiglu_limit=7.0 if limited else None,
            swiglu_limit_shared=16.0 if limited else None,
        )


def test_the_packaged_config_is_the_published_one_as_transformers_reads_it():
    configuration = pytest.importorskip("transformers.models.step3p7.configuration_step3p7")
    reference = configuration.Step3p7TextConfig(**published())
    config = Step35Config.from_pretrained(packaged_config_path())
    decoder, mtp = config.layers[:45], config.layers[45:]

    assert [plan.attention_type for plan in decoder] == reference.layer_types
    assert [plan.attention_type for plan in mtp] == reference.mtp_layer_types
    kinds = ["sparse" if plan.is_moe else "dense" for plan in config.layers]
    assert kinds == reference.mlp_layer_types + reference.mtp_mlp_layer_types
    assert [plan.swiglu_limit or 0 for plan in decoder] == reference.swiglu_limits
    assert [plan.swiglu_limit_shared or 0 for plan in decoder] == reference.swiglu_limits_shared
    for plan in decoder:
        heads = reference.per_layer_config[plan.index].num_attention_heads
        assert plan.num_attention_heads == heads
        assert plan.num_query_groups == reference.num_key_value_heads
        assert plan.kv_channels == reference.head_dim
        if plan.window_size:
            assert plan.window_size == (reference.sliding_window - 1, 0)
        rope = reference.rope_parameters[plan.attention_type]
        assert plan.rotary_base == rope["rope_theta"]
        assert plan.rotary_percent == rope["partial_rotary_factor"]
        assert (plan.rope_scaling is not None) == (rope["rope_type"] == "llama3")
        if plan.rope_scaling:
            for name in RopeScaling.__slots__:
                assert getattr(plan.rope_scaling, name) == rope[name]
    assert config.moe_num_experts == reference.n_routed_experts
    assert config.moe_top_k == reference.num_experts_per_tok
    assert config.moe_router_scaling_factor == reference.moe_router_scaling_factor


def test_what_transformers_saves_of_it_is_the_same_model():
    configuration = pytest.importorskip("transformers.models.step3p7.configuration_step3p7")
    config = Step35Config.from_dict(published())
    saved = json.loads(configuration.Step3p7TextConfig(**published()).to_json_string())
    assert "rope_theta" not in saved and "moe_layers_enum" not in saved
    wrapped = json.loads(configuration.Step3p7Config(text_config=published()).to_json_string())
    for data in (saved, wrapped):
        assert Step35Config.from_dict(data).layers == config.layers
        assert Step35Config.from_dict(data).fingerprint == config.fingerprint


def test_the_saved_form_keeps_the_types_of_mtp_layers():
    full = Step35Config.from_dict(resaved()).layers
    types = [*tiny()["layer_types"][:6], FULL, FULL]
    expected = tiny(
        layer_types=types,
        rope_theta=[5e4 if kind == FULL else 1e4 for kind in types],
        partial_rotary_factors=[0.5 if kind == FULL else 1.0 for kind in types],
    )
    assert full == Step35Config.from_dict(expected).layers
    assert [plan.attention_type for plan in full[6:]] == [FULL] * 2


def test_the_saved_form_names_no_layers_where_all_have_the_same_heads():
    data = resaved() | {"num_sliding_attention_heads": 4, "per_layer_config": {}}
    assert {plan.num_attention_heads for plan in Step35Config.from_dict(data).layers} == {4}


@pytest.mark.parametrize("seed", range(10))
def test_random_configs_survive_a_save_by_transformers(seed):
    configuration = pytest.importorskip("transformers.models.step3p7.configuration_step3p7")
    data, plans = random_config(random.Random(seed))
    # transformers scales the full layers whatever the list says, and has no default for MTP layers.
    if data["rope_scaling"]:
        data["yarn_only_types"] = [FULL]
    config = Step35Config.from_dict(data)
    data["layer_types"] = [plan.attention_type for plan in plans]
    data["rope_theta"] = [plan.rotary_base for plan in plans]
    data["partial_rotary_factors"] = [plan.rotary_percent for plan in plans]
    decoder = data["layer_types"][: data["num_hidden_layers"]]
    if set(data["layer_types"]) != set(decoder):
        pytest.skip("transformers keeps no RoPE for a layer type that only MTP layers have")
    saved = configuration.Step3p7TextConfig(**copy.deepcopy(data)).to_json_string()
    assert Step35Config.from_dict(json.loads(saved)).layers == config.layers


# --- spellings --------------------------------------------------------------------------------


def test_the_window_of_the_other_trainer_has_one_key_more():
    config = Step35Config.from_dict(tiny(sliding_window=8))
    assert config.layers == config.resolve("hf")
    assert config.layers[1].window_size == (7, 0)
    steptron = config.resolve("steptron")
    assert [plan.window_size for plan in steptron[:2]] == [None, (8, 0)]
    with pytest.raises(ValueError, match='expected "hf" or "steptron", found "vllm"'):
        config.resolve("vllm")


@pytest.mark.parametrize("data", [published(), tiny()], ids=["published", "tiny"])
def test_lists_without_the_mtp_layers_entries_mean_the_same(data):
    short = {**data, **{name: data[name][: data["num_hidden_layers"]] for name in PER_LAYER}}
    expected = Step35Config.from_dict(data).layers
    assert Step35Config.from_dict(short).layers == expected
    for name in PER_LAYER:
        assert Step35Config.from_dict({**data, name: short[name]}).layers == expected


def test_one_rope_base_is_that_of_every_layer():
    layers = Step35Config.from_dict(tiny(rope_theta=10000)).layers
    assert {plan.rotary_base for plan in layers} == {10000.0}
    assert isinstance(layers[0].rotary_base, float)


def test_missing_lists_mean_full_rotation_and_no_clamp():
    data = tiny(swiglu_limits=None)
    del data["partial_rotary_factors"], data["swiglu_limits_shared"]
    for plan in Step35Config.from_dict(data).layers:
        assert plan.rotary_percent == 1.0
        assert plan.swiglu_limit is None and plan.swiglu_limit_shared is None


def test_clamps_are_none_where_the_list_has_zero_or_null():
    layers = Step35Config.from_dict(tiny()).layers
    assert [plan.swiglu_limit for plan in layers] == [None, None, None, 0.5] + [None] * 4
    assert [plan.swiglu_limit_shared for plan in layers[:4]] == [0.25, None, None, 0.75]


@pytest.mark.parametrize("scaled", [[FULL], [SLIDING], [FULL, SLIDING]])
def test_scaling_applies_to_the_types_it_names(scaled):
    layers = Step35Config.from_dict(tiny(yarn_only_types=scaled)).layers
    for plan in layers:
        assert (plan.rope_scaling is not None) == (plan.attention_type in scaled)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"type": "default"}])
def test_no_scaling_needs_no_layer_types(scaling):
    data = edited(tiny(rope_scaling=scaling), "yarn_only_types", ...)
    assert not any(plan.rope_scaling for plan in Step35Config.from_dict(data).layers)


def test_the_older_key_of_the_scaling_type():
    scaling = {("type" if k == "rope_type" else k): v for k, v in tiny()["rope_scaling"].items()}
    data = tiny(rope_scaling=scaling)
    assert Step35Config.from_dict(data).layers == Step35Config.from_dict(tiny()).layers


def test_no_layers_without_rope_may_be_null():
    expected = Step35Config.from_dict(tiny()).layers
    assert Step35Config.from_dict(tiny(use_rope_layers=None)).layers == expected


@pytest.mark.parametrize("enum", ["2,3,4,5", " 2, 3 ,4,5", [5, 4, 3, 2], (2, 3, 4, 5)])
def test_moe_layers_as_text_or_list(enum):
    layers = Step35Config.from_dict(tiny(moe_layers_enum=enum)).layers
    assert [plan.index for plan in layers if plan.is_moe] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "changes",
    [{"use_moe": False, "moe_layers_enum": None}, {"moe_layers_enum": []}, {"moe_layers_enum": ""}],
)
def test_a_dense_model_needs_no_experts(changes):
    data = tiny(**changes)
    for name in list(data):
        if (name.startswith("moe_") and name != "moe_layers_enum") or name == "share_expert_dim":
            del data[name]
    assert not any(plan.is_moe for plan in Step35Config.from_dict(data).layers)


def test_a_model_without_sliding_layers_needs_no_window():
    data = tiny(num_nextn_predict_layers=0, layer_types=[FULL] * 6, rope_theta=1e4)
    data |= {name: None for name in ("swiglu_limits", "swiglu_limits_shared")}
    for name in ("attention_other_setting", "sliding_window", "partial_rotary_factors"):
        del data[name]
    layers = Step35Config.from_dict(data).layers
    assert [plan.num_attention_heads for plan in layers] == [4] * 6
    assert not any(plan.window_size for plan in layers)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("num_key_value_heads", "num_attention_groups"),
        ("n_routed_experts", "moe_num_experts"),
        ("num_local_experts", "moe_num_experts"),
        ("num_experts_per_tok", "moe_top_k"),
        ("share_expert_dims", "share_expert_dim"),
        ("num_mtp_layers", "num_nextn_predict_layers"),
        ("dtype", "torch_dtype"),
    ],
)
def test_transformers_names(alias, name):
    expected = Step35Config.from_dict(tiny())
    data = tiny()
    data[alias] = data[name]
    assert getattr(Step35Config.from_dict(data), name) == getattr(expected, name)
    value = data.pop(name)
    renamed = Step35Config.from_dict(data)
    assert getattr(renamed, name) == value
    assert renamed.fingerprint == expected.fingerprint
    assert renamed.to_dict()[alias] == value

    (problem,) = problems_of({**data, alias: "many"})
    assert problem.field == name and alias in problem.hint
    clash = problems_of({**data, name: value, alias: "many"})
    assert (clash[0].field, clash[0].expected) == (name, "one value")
    assert json.dumps(value) in clash[0].found and '"many"' in clash[0].found


@pytest.mark.parametrize("wrapper", [{}, {"model_type": "step3p7"}, {"model_type": "step3p5"}])
def test_of_a_multimodal_config_only_the_language_model_counts(wrapper):
    data = {**wrapper, "text_config": tiny(), "hidden_size": 1, "vision_config": {"layers": 3}}
    config = Step35Config.from_dict(data)
    assert config == Step35Config.from_dict(tiny())
    assert config.to_dict() == tiny()


def test_a_dtype_of_nothing_gives_way_to_the_outer_one():
    """Each of the two names for it may stand on either level, and transformers writes null."""
    inner = tiny(dtype=None)
    inner.pop("torch_dtype", None)
    data = {"model_type": "step3p7", "torch_dtype": "bfloat16", "text_config": inner}
    assert Step35Config.from_dict(data).torch_dtype == "bfloat16"


def test_problems_of_a_multimodal_config_name_the_nested_field():
    data = {"model_type": "step3p7", "text_config": tiny(hidden_size=0), "hidden_size": 24}
    assert [problem.field for problem in problems_of(data)] == ["text_config.hidden_size"]
    (problem,) = problems_of({"model_type": "llava", "text_config": tiny()})
    assert (problem.field, problem.found) == ("model_type", '"llava"')
    assert '"step3p7"' in problem.expected
    first, *missing = problems_of({"text_config": 3})
    assert first.expected == "an object"
    assert "hidden_size" in {problem.field for problem in missing}


# --- the object -------------------------------------------------------------------------------


def test_unknown_fields_are_kept():
    data = tiny(note="mine", nested={"list": [1, {"a": None}]}, layers=3)
    config = Step35Config.from_dict(data)
    assert config.note == "mine" and config.nested["list"][1] == {"a": None}
    assert config.to_dict() == data
    assert len(config.layers) == 8


def test_nothing_in_a_config_can_change():
    data = published()
    config = Step35Config.from_dict(data)
    before = config.fingerprint, config.to_dict()
    for change in (
        lambda: setattr(config, "hidden_size", 1),
        lambda: setattr(config, "something_new", 1),
        lambda: setattr(config.attention_other_setting, "num_attention_heads", 1),
        lambda: setattr(config.layers[0], "is_moe", True),
        lambda: config.layer_types.append(FULL),
        lambda: config.layers.append(None),
        lambda: config.auto_map.update(x=1),
        lambda: config.auto_map.pop("AutoConfig"),
        lambda: config.auto_map.__setitem__("x", 1),
    ):
        with pytest.raises((TypeError, AttributeError, ValueError)):
            change()
    config.to_dict()["layer_types"].clear()
    data["layer_types"].clear()
    assert (config.fingerprint, config.to_dict()) == before


def test_it_pickles_copies_and_hashes():
    config = Step35Config.from_dict(published())
    for resolve_first in (False, True):
        if resolve_first:
            assert config.layers
        for other in (
            pickle.loads(pickle.dumps(config)),
            copy.copy(config),
            copy.deepcopy(config),
            Step35Config.from_dict(config.to_dict()),
            Step35Config(**config.to_dict()),
        ):
            assert other == config and hash(other) == hash(config)
            assert other.layers == config.layers and other.to_dict() == published()
    error = pickle.loads(pickle.dumps(Step35ConfigError(problems_of({}), "a.json")))
    assert str(error).startswith("a.json: ") and error.problems == problems_of({})


def test_a_changed_copy_is_checked():
    config = Step35Config.from_dict(tiny())
    assert config.model_copy(update={"sliding_window": 3}).layers[1].window_size == (2, 0)
    with pytest.raises(Step35ConfigError, match="sliding_window"):
        config.model_copy(update={"sliding_window": 0})


def test_what_pydantic_dumps_is_the_same_model():
    for config in map(Step35Config.from_dict, (published(), tiny(rope_scaling=None))):
        with warnings.catch_warnings(action="error"):
            for data in (config.model_dump(), json.loads(config.model_dump_json())):
                assert Step35Config.from_dict(data).fingerprint == config.fingerprint


def test_what_a_config_leaves_out_is_what_the_published_one_says():
    data = tiny()
    data.pop("att_impl_type", None)
    assert Step35Config.from_dict(data).att_impl_type == published()["att_impl_type"]


def test_the_fingerprint_is_that_of_the_computation():
    fingerprint = Step35Config.from_dict(tiny()).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32
    for same in (
        tiny(torch_dtype="bfloat16"),
        tiny(note=1, eos_token_id=[1, 2], max_position_embeddings=1024),
        tiny(moe_layers_enum="2,3,4,5"),
        tiny(swiglu_limits=[None, None, None, 0.5, None, None]),
    ):
        assert Step35Config.from_dict(same).fingerprint == fingerprint
    others = [
        tiny(**change)
        for change in (
            {"hidden_size": 32},
            {"rms_norm_eps": 1e-6},
            {"sliding_window": 9},
            {"use_head_wise_attn_gate": False},
            {"moe_top_k": 3},
            {"moe_router_scaling_factor": 2.5},
            {"rope_theta": 1e4},
            {"swiglu_limits": None},
            {"moe_layers_enum": [3, 4, 5]},
            {"yarn_only_types": [SLIDING]},
        )
    ]
    fingerprints = {Step35Config.from_dict(data).fingerprint for data in others}
    assert len(fingerprints | {fingerprint}) == len(others) + 1


# --- random configs ---------------------------------------------------------------------------


def random_config(rng):
    """A legal config, in any of the legal forms, and the plan of each of its layers."""
    decoder, mtp = rng.randint(1, 9), rng.randint(0, 3)
    kinds = [rng.choice((FULL, SLIDING)) for _ in range(decoder)] + [SLIDING] * mtp
    groups, head_dim = rng.choice((1, 2, 4)), rng.choice((8, 16, 128))
    heads = {FULL: groups * rng.randint(1, 4), SLIDING: groups * rng.randint(1, 4)}
    bases = {FULL: rng.choice((1e4, 5e6)), SLIDING: rng.choice((1e4, 1e5))}
    shares = {FULL: rng.choice((0.25, 0.5, 1.0)), SLIDING: rng.choice((0.5, 1.0))}
    scaled = rng.choice((None, [FULL], [SLIDING], [FULL, SLIDING]))
    window = rng.randint(1, 600)
    moe = sorted(rng.sample(range(decoder), rng.randint(0, decoder)))
    limits = {
        name: [rng.choice((0, 0.0, None, 7, 0.5)) for _ in range(decoder)] + [0] * mtp
        for name in PER_LAYER[3:]
    }
    # The decoder has no layer for the MTP layers to take a value from.
    short_ok = SLIDING in kinds[:decoder]

    def form(values, short_ok=True):
        return values[:decoder] if short_ok and rng.random() < 0.5 else values

    scaling = RopeScaling("llama3", rng.choice((1, 8.0)), 1.0, rng.choice((4, 32.0)), 8192)
    data = tiny(
        num_hidden_layers=decoder,
        num_nextn_predict_layers=mtp,
        num_attention_heads=heads[FULL],
        num_attention_groups=groups,
        head_dim=head_dim,
        attention_other_setting={
            "attention_type": SLIDING,
            "num_attention_heads": heads[SLIDING],
        },
        sliding_window=window,
        layer_types=form(kinds),
        rope_theta=form([bases[kind] for kind in kinds], short_ok),
        partial_rotary_factors=form([shares[kind] for kind in kinds], short_ok),
        rope_scaling=(
            None
            if scaled is None
            else {name: getattr(scaling, name) for name in RopeScaling.__slots__}
        ),
        yarn_only_types=scaled,
        swiglu_limits=form(limits["swiglu_limits"]),
        swiglu_limits_shared=form(limits["swiglu_limits_shared"]),
        moe_layers_enum=rng.choice((moe, ",".join(map(str, moe)))),
    )
    plans = tuple(
        LayerPlan(
            index=index,
            is_mtp=index >= decoder,
            is_moe=index in moe,
            attention_type=kind,
            num_attention_heads=heads[kind],
            num_query_groups=groups,
            kv_channels=head_dim,
            window_size=(window - 1, 0) if kind == SLIDING else None,
            rotary_base=bases[kind],
            rotary_percent=shares[kind],
            rope_scaling=scaling if kind in (scaled or ()) else None,
            swiglu_limit=limits["swiglu_limits"][index] or None,
            swiglu_limit_shared=limits["swiglu_limits_shared"][index] or None,
        )
        for index, kind in enumerate(kinds)
    )
    return data, plans


@pytest.mark.parametrize("seed", range(40))
def test_random_legal_configs_resolve_to_their_plans(seed, tmp_path):
    data, plans = random_config(random.Random(seed))
    config = Step35Config.from_dict(data)
    assert config.layers == plans
    assert config.to_dict() == data
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert Step35Config.from_pretrained(file) == config
