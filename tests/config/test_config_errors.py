"""A config that cannot be used is refused with every reason in one exception."""

import random

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

from step35_patch.config import Step35Config, Step35ConfigError

# --- what is refused --------------------------------------------------------------------------

WRONG = [
    # path, value (... removes it), field, expected, found, hint
    ("model_type", ..., "model_type", '"step3p5"', "nothing", "required"),
    ("model_type", "llama", "model_type", '"step3p5"', '"llama"', ""),
    ("torch_dtype", "int8", "torch_dtype", '"bfloat16", "float16" or "float32"', '"int8"', ""),
    ("num_hidden_layers", "45", "num_hidden_layers", "an integer", '"45"', ""),
    ("num_hidden_layers", 45.0, "num_hidden_layers", "an integer", "45.0", ""),
    ("num_hidden_layers", 10**9, "num_hidden_layers", "9999", "1000000000", ""),
    ("num_nextn_predict_layers", -1, "num_nextn_predict_layers", "0 to 9999", "-1", ""),
    ("num_nextn_predict_layers", 10**9, "num_nextn_predict_layers", "9999", "1000000000", ""),
    ("head_dim", 10**400, "head_dim", "64 bits", "larger", ""),
    ("hidden_size", True, "hidden_size", "a positive integer", "true", ""),
    ("hidden_size", 0, "hidden_size", "a positive integer", "0", ""),
    ("hidden_size", 2**63, "hidden_size", "64 bits", "larger", ""),
    ("intermediate_size", ..., "intermediate_size", "a positive integer", "nothing", "required"),
    ("vocab_size", -5, "vocab_size", "a positive integer", "-5", ""),
    ("max_position_embeddings", None, "max_position_embeddings", "positive", "null", ""),
    ("rms_norm_eps", ..., "rms_norm_eps", "a positive, finite number", "nothing", "required"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps", "a finite number", "NaN", ""),
    ("architectures", "Step", "architectures", "a list of strings", '"Step"', ""),
    ("eos_token_id.1", "x", "eos_token_id[1]", "a token id", '"x"', ""),
    # layer types
    ("layer_types", ..., "layer_types", "a list of layer types", "nothing", "required"),
    ("layer_types", FULL, "layer_types", "a list of layer types", f'"{FULL}"', ""),
    ("layer_types.3", "sliding_atention", "layer_types[3]", FULL, "atention", f'"{SLIDING}"?'),
    ("layer_types.4", "full", "layer_types[4]", SLIDING, '"full"', f'"{FULL}"?'),
    ("layer_types.4", "Full_Attention", "layer_types[4]", FULL, "Full_At", f'"{FULL}"?'),
    ("layer_types.4", "FULL_ATTENTION", "layer_types[4]", FULL, "FULL_A", f'"{FULL}"?'),
    ("layer_types.0", 7, "layer_types[0]", FULL, "7", ""),
    ("layer_types", [FULL] * 44, "layer_types", "a list of 45", "a list of 44", "3 MTP layers"),
    ("layer_types", [FULL] * 47, "layer_types", "45 (num_hidden_layers) or 48", "of 47", ""),
    # heads
    ("num_attention_heads", 60, "num_attention_heads", "num_attention_groups (8)", "60", ""),
    ("num_attention_groups", 0, "num_attention_groups", "a positive integer", "0", ""),
    ("head_dim", ..., "head_dim", "a positive integer", "nothing", ""),
    ("attention_other_setting", ..., "attention_other_setting", "36 layers", "nothing", ""),
    ("attention_other_setting", None, "attention_other_setting", "sliding", "nothing", ""),
    ("attention_other_setting", [], "attention_other_setting", "an object", "[]", ""),
    (
        "attention_other_setting.attention_type",
        FULL,
        "attention_other_setting.attention_type",
        f'"{SLIDING}"',
        f'"{FULL}"',
        "",
    ),
    (
        "attention_other_setting.num_attention_heads",
        ...,
        "attention_other_setting.num_attention_heads",
        "a positive integer",
        "nothing",
        "required",
    ),
    (
        "attention_other_setting.num_attention_heads",
        90,
        "attention_other_setting.num_attention_heads",
        "num_attention_groups (8)",
        "90",
        "",
    ),
    (
        "attention_other_setting.num_attention_groups",
        4,
        "attention_other_setting.num_attention_groups",
        "8, the model's num_attention_groups",
        "4",
        "only the number of query heads",
    ),
    (
        "attention_other_setting.head_dim",
        64,
        "attention_other_setting.head_dim",
        "128, the model's head_dim",
        "64",
        "",
    ),
    (
        "attention_other_setting.true_head_dim",
        64,
        "attention_other_setting.true_head_dim",
        "128",
        "64",
        "",
    ),
    ("sliding_window", ..., "sliding_window", "36 layers are sliding", "nothing", ""),
    ("sliding_window", None, "sliding_window", "a positive integer", "nothing", ""),
    ("sliding_window", 0, "sliding_window", "a positive integer", "0", ""),
    # RoPE
    ("rope_theta", ..., "rope_theta", "a positive number, or a list", "nothing", "required"),
    ("rope_theta", "1e4", "rope_theta", "a positive, finite number", '"1e4"', ""),
    ("rope_theta", 0, "rope_theta", "a positive, finite number", "0", ""),
    ("rope_theta", [1e4] * 46, "rope_theta", "a list of 45", "a list of 46", ""),
    ("rope_theta", [1e4, 2e4, 3e4], "rope_theta", "a list of 45", "a list of 3", ""),
    ("rope_theta.7", -1e4, "rope_theta[7]", "a positive, finite number", "-10000.0", ""),
    ("rope_theta.7", float("inf"), "rope_theta[7]", "a finite number", "Infinity", ""),
    ("rope_theta.7", False, "rope_theta[7]", "a positive, finite number", "false", ""),
    ("partial_rotary_factors", 0.5, "partial_rotary_factors", "a list", "0.5", ""),
    ("partial_rotary_factors.4", 1.5, "partial_rotary_factors[4]", "at most 1", "1.5", ""),
    ("partial_rotary_factors.4", 0, "partial_rotary_factors[4]", "above 0", "0", ""),
    ("partial_rotary_factors.4", 0.3, "partial_rotary_factors[4]", "whole", "gives 38.4", ""),
    ("partial_rotary_factors.4", 3 / 128, "partial_rotary_factors[4]", "even", "gives 3", ""),
    ("partial_rotary_factors.4", 1e-9, "partial_rotary_factors[4]", "even", "1e-09", ""),
    ("rope_scaling", "llama3", "rope_scaling", "an object", '"llama3"', ""),
    ("rope_scaling.rope_type", "yarn", "rope_scaling.rope_type", '"llama3"', '"yarn"', ""),
    ("rope_scaling.rope_type", ..., "rope_scaling.rope_type", '"llama3"', "nothing", "required"),
    ("rope_scaling.type", "yarn", "rope_scaling.rope_type", "one value", '"yarn"', "type"),
    ("rope_scaling.factor", 0.5, "rope_scaling.factor", "at least 1", "0.5", ""),
    ("rope_scaling.factor", ..., "rope_scaling.factor", "at least 1", "nothing", "required"),
    ("rope_scaling.low_freq_factor", 32, "rope_scaling.low_freq_factor", "(32)", "32", ""),
    ("rope_scaling.low_freq_factor", 0, "rope_scaling.low_freq_factor", "positive", "0", ""),
    ("rope_scaling.high_freq_factor", None, "rope_scaling.high_freq_factor", "pos", "null", ""),
    (
        "rope_scaling.original_max_position_embeddings",
        ...,
        "rope_scaling.original_max_position_embeddings",
        "a positive integer",
        "nothing",
        "required",
    ),
    ("rope_scaling.rope_theta", 1e4, "rope_scaling.rope_theta", "no such key", "10000", ""),
    ("yarn_only_types", ..., "yarn_only_types", "rope_scaling applies to", "nothing", FULL),
    ("yarn_only_types", [], "yarn_only_types", "rope_scaling applies to", "[]", "drop"),
    ("yarn_only_types.0", "ful_attention", "yarn_only_types[0]", FULL, "ful_", f'"{FULL}"?'),
    ("yarn_only_types", FULL, "yarn_only_types", "a list", f'"{FULL}"', ""),
    # clamps
    ("swiglu_limits.43", -7, "swiglu_limits[43]", "at least 0, or null", "-7", ""),
    ("swiglu_limits.43", "7", "swiglu_limits[43]", "at least 0, or null", '"7"', ""),
    ("swiglu_limits", [7.0], "swiglu_limits", "a list of 45", "a list of 1", ""),
    ("swiglu_limits", 7.0, "swiglu_limits", "a list of limits", "7.0", ""),
    ("swiglu_limits_shared.44", float("inf"), "swiglu_limits_shared[44]", "finite", "Inf", ""),
    ("swiglu_limits_shared", [], "swiglu_limits_shared", "a list of 45", "a list of 0", ""),
    # experts
    ("moe_layers_enum", ..., "moe_layers_enum", "use_moe is true", "nothing", "use_moe false"),
    ("moe_layers_enum", "3,x,5", "moe_layers_enum[1]", "a layer index", '"x"', ""),
    ("moe_layers_enum", "3,,5", "moe_layers_enum[1]", "a layer index", '""', ""),
    ("moe_layers_enum", [3, True], "moe_layers_enum[1]", "a layer index", "true", ""),
    ("moe_layers_enum", [3, -1], "moe_layers_enum[1]", "a layer index", "-1", ""),
    ("moe_layers_enum", "3,45", "moe_layers_enum[1]", "0 to 44", "45", "MTP layers are dense"),
    ("moe_layers_enum", "3,48", "moe_layers_enum[1]", "0 to 44", "48", ""),
    ("moe_layers_enum", "3,4,3", "moe_layers_enum[2]", "each layer once", "3 again", ""),
    ("moe_layers_enum", 3, "moe_layers_enum", "as a list or as one string", "3", ""),
    ("use_moe", False, "moe_layers_enum", "no MoE layers", "[3, 4", ""),
    ("use_moe", 1, "use_moe", "true or false", "1", ""),
    ("moe_num_experts", ..., "moe_num_experts", "a positive integer, as 42", "nothing", ""),
    ("moe_num_experts", 4, "moe_top_k", "at most moe_num_experts (4)", "8", ""),
    ("moe_top_k", 0, "moe_top_k", "a positive integer", "0", ""),
    ("moe_intermediate_size", None, "moe_intermediate_size", "a positive", "nothing", ""),
    ("share_expert_dim", ..., "share_expert_dim", "a positive", "nothing", ""),
    (
        "moe_router_scaling_factor",
        ...,
        "moe_router_scaling_factor",
        "a positive number",
        "nothing",
        "1.0",
    ),
    ("moe_router_scaling_factor", 0, "moe_router_scaling_factor", "positive", "0", ""),
    # what the reference computes in one way
    ("use_qk_norm", False, "use_qk_norm", "true", "false", ""),
    ("zero_centered", False, "zero_centered", "true", "false", ""),
    ("sink", True, "sink", "false", "true", ""),
    ("sink", 0, "sink", "false", "0", ""),
    ("norm_expert_weight", False, "norm_expert_weight", "true", "false", ""),
    ("norm_expert_weight", 1, "norm_expert_weight", "true", "1", ""),
    ("moe_router_activation", "softmax", "moe_router_activation", '"sigmoid"', '"softmax"', ""),
    ("use_moe_router_bias", False, "use_moe_router_bias", "true", "false", ""),
    ("need_fp32_gate", False, "need_fp32_gate", "true", "false", ""),
    ("tie_word_embeddings", True, "tie_word_embeddings", "false", "true", ""),
    ("use_rope_layers", [1], "use_rope_layers", "[]", "[1]", ""),
    ("att_impl_type", "MFA", "att_impl_type", '"GQA"', '"MFA"', ""),
    ("hidden_act", "gelu", "hidden_act", '"silu"', '"gelu"', ""),
    ("attention_bias", True, "attention_bias", "false", "true", ""),
    ("attention_dropout", 0.1, "attention_dropout", "0.0", "0.1", ""),
    ("mlp_bias", True, "mlp_bias", "false", "true", ""),
    ("moe_every_n_layer", 2, "moe_every_n_layer", "1", "2", ""),
    ("moe_layer_offset", True, "moe_layer_offset", "0", "true", ""),
    ("query_pre_attn_scalar", 64, "query_pre_attn_scalar", "128", "64", ""),
    ("use_bidirectional_attention", True, "use_bidirectional_attention", "false", "true", ""),
    ("use_head_wise_attn_gate", "yes", "use_head_wise_attn_gate", "true or false", '"yes"', ""),
    # anywhere
    ("note", float("-inf"), "note", "a finite number", "-Infinity", ""),
    ("auto_map.AutoConfig", {1}, "auto_map.AutoConfig", "a JSON value", "set", ""),
    ("auto_map.\udfff", 1, "auto_map", "keys of whole characters", '"\\udfff"', ""),
    # transformers' own form
    ("mlp_layer_types", ["dense"] * 45, "moe_layers_enum", "mlp_layer_types", "both", ""),
    ("mlp_layer_types", ["moe"] * 45, "mlp_layer_types", '"sparse"', '"moe"', ""),
    ("mtp_mlp_layer_types", ["sparse"], "mtp_mlp_layer_types", '"dense"', '"sparse"', ""),
    ("mtp_layer_types", [SLIDING], "layer_types", "mtp_layer_types", "a list of 48", ""),
    ("num_sliding_attention_heads", 8, "attention_other_setting", "either", "both", ""),
    ("per_layer_config", {"1": {}}, "per_layer_config", "each sliding layer", '{"1"', ""),
    ("rope_parameters", {"rope_theta": 1e4}, "rope_parameters", FULL, "rope_theta", ""),
]


@pytest.mark.parametrize(
    ("path", "value", "field", "expected", "found", "hint"),
    WRONG,
    ids=[f"{case[0]}={'missing' if case[1] is ... else str(case[1])[:20]}" for case in WRONG],
)
def test_one_wrong_field_is_one_problem(path, value, field, expected, found, hint):
    (problem,) = problems_of(edited(published(), path, value))
    assert problem.field == field
    assert expected in problem.expected
    assert found in problem.found
    assert hint in problem.hint
    line = str(problem)
    assert line.startswith(f"{field}: expected ") and "\n" not in line


def test_every_problem_of_a_config_comes_at_once():
    data = published()
    data["layer_types"][3] = "sliding"
    data["num_attention_heads"] = 63
    data["sliding_window"] = None
    data["use_moe"] = "yes"
    data["moe_top_k"] = 300
    data["swiglu_limits"] = data["swiglu_limits"][:7]
    data["hiden_size"] = data.pop("hidden_size")
    data["rope_scaling"]["factor"] = float("nan")
    problems = problems_of(data)
    assert {problem.field for problem in problems} == {
        "layer_types[3]",
        "num_attention_heads",
        "use_moe",
        "swiglu_limits",
        "hidden_size",
        "rope_scaling.factor",
    }
    # What depends on a wrong field is not judged; it shows once that field is right.
    data["layer_types"][3], data["use_moe"] = SLIDING, True
    fields = {problem.field for problem in problems_of(data)}
    assert {"sliding_window", "moe_top_k"} < fields
    text = str(Step35ConfigError(problems, "some/config.json"))
    assert text.splitlines()[0] == "some/config.json: 6 problems"
    assert len(text.splitlines()) == 7


def test_equal_problems_of_a_list_are_one():
    data = published()
    data["layer_types"] = ["swa" if kind == SLIDING else kind for kind in data["layer_types"]]
    (problem,) = problems_of(data)
    assert problem.field.startswith("layer_types[1-3,5-7,9-11,") and '"swa"' in problem.found
    data["rope_theta"][5] = 0
    assert [p.field for p in problems_of(data)][1:] == ["rope_theta[5]"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("hidden_size", "hiden_size"),
        ("swiglu_limits", "swiglu_limit"),
        ("rope_scaling", "rope_scalings"),
        ("partial_rotary_factors", "partial_rotary_factor"),
        ("use_head_wise_attn_gate", "use_headwise_attn_gate"),
    ],
)
def test_a_misspelt_name_is_not_an_unknown_field(right, wrong):
    data = published()
    data[wrong] = data.pop(right)
    (problem,) = problems_of(data)
    assert (problem.field, problem.hint) == (right, "rename it")
    assert f'"{wrong}"' in problem.found
    # Beside the right one it is an unknown field like any other.
    assert Step35Config.from_dict({**data, right: data[wrong]}).to_dict()[wrong] == data[wrong]


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("yarn_only_types", [FULL, SLIDING], "yarn_only_types", f'["{FULL}"], as in rope_param'),
        ("yarn_only_types", [FULL, FULL], "yarn_only_types", f'["{FULL}"], as in rope_param'),
        ("per_layer_config.02.num_attention_heads", 4, "per_layer_config", "each sliding layer"),
        ("per_layer_config.02", ..., "per_layer_config", "each sliding layer"),
        ("per_layer_config.00", {"num_attention_heads": 6}, "per_layer_config", "each sliding"),
        ("per_layer_config.02.head_dim", 4, "per_layer_config", "nothing else"),
        ("per_layer_config.07", {"num_attention_heads": 6}, "per_layer_config", "nothing else"),
        ("per_layer_config", {}, "per_layer_config", "each sliding layer"),
        ("per_layer_config", 3, "per_layer_config", "each sliding layer"),
        ("mtp_layer_types.0", "ful", "layer_types[6]", FULL),
        ("mtp_layer_types", "full", "mtp_layer_types", "a list of layer types"),
        ("num_sliding_attention_heads", 5, "attention_other_setting.num_attention_heads", "(2)"),
        ("mlp_layer_types.0", "moe", "mlp_layer_types", '"sparse"'),
        ("mtp_mlp_layer_types.1", "sparse", "mtp_mlp_layer_types", '"dense"'),
        ("layer_types.2", "slide", "layer_types[2]", SLIDING),
        (f"rope_parameters.{SLIDING}", ..., "rope_parameters", f"{FULL} and {SLIDING}"),
        (f"rope_parameters.{SLIDING}.rope_theta", 0, "rope_theta[1-2,4-5]", "positive"),
        (f"rope_parameters.{FULL}.factor", ..., "rope_scaling.factor", "at least 1"),
        (f"rope_parameters.{FULL}.rope_type", ..., "rope_scaling.rope_type", '"llama3"'),
        (f"rope_parameters.{SLIDING}.rope_theta", ..., "rope_theta[1-2,4-5]", "positive"),
        (f"rope_parameters.{FULL}.factor", 0, "rope_scaling.factor", "at least 1"),
        (f"rope_parameters.{FULL}.rope_type", "yarn", "rope_scaling.rope_type", '"llama3"'),
    ],
)
def test_one_wrong_field_of_the_saved_form(path, value, field, expected):
    data = resaved()
    *parents, last = path.split(".")
    target = data
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    elif isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value
    if path.startswith("num_sliding"):
        del data["per_layer_config"]
    (problem,) = problems_of(data)
    assert problem.field == field and expected in problem.expected


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (f"rope_parameters.{FULL}.factor", 0, "rope_scaling.factor"),
        ("num_sliding_attention_heads", 5, "attention_other_setting.num_attention_heads"),
    ],
)
def test_a_problem_of_the_saved_form_says_where_it_stands_in_the_file(path, value, field):
    data = edited(resaved(), path, value)
    del data["per_layer_config"]
    (problem,) = problems_of(data)
    assert problem.field == field and f"it is {path.split('.')[0]} in this file" in problem.hint


def test_the_saved_form_has_one_scaling():
    data = resaved()
    scaled = data["rope_parameters"][FULL]
    data["rope_parameters"][SLIDING] = {**scaled, "rope_theta": 1e4, "factor": 4.0}
    data["yarn_only_types"] = None
    (problem,) = problems_of(data)
    assert (problem.field, problem.expected[:11]) == ("rope_parameters", "one scaling")
    assert FULL in problem.found


def test_lists_for_mtp_layers_that_are_not_counted():
    for count in (0, ...):
        data = edited(tiny(), "num_nextn_predict_layers", count)
        problems = problems_of(data)
        assert {problem.field for problem in problems} == set(PER_LAYER)
        for problem in problems:
            assert (problem.expected[:19], problem.found) == ("a list of 6 entries", "a list of 8")
            assert "num_nextn_predict_layers" in problem.hint


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factors"])
def test_mtp_layers_without_an_entry_need_one_value_for_their_type(name):
    data = tiny()
    data[name] = data[name][:6]
    assert Step35Config.from_dict(data)
    data[name][2] /= 2
    (problem,) = problems_of(data)
    assert problem.field == name and "a list of 8" in problem.expected
    assert SLIDING in problem.found

    all_full = tiny(layer_types=[FULL] * 6, partial_rotary_factors=None, rope_theta=1e4)
    data = {**all_full, name: [1.0] * 6}
    (problem,) = problems_of(data)
    assert problem.field == name and "[]" in problem.found
    assert Step35Config.from_dict({**data, "layer_types": [FULL] * 8})


def test_mtp_layers_without_an_entry_are_sliding_layers_with_their_needs():
    data = tiny(layer_types=[FULL] * 6, rope_theta=1e4, partial_rotary_factors=None)
    assert [p.attention_type for p in Step35Config.from_dict(data).layers[6:]] == [SLIDING] * 2
    (problem,) = problems_of({**data, "sliding_window": None})
    assert problem.field == "sliding_window" and "2 MTP layers" in problem.expected


def test_a_whole_head_is_rotated_without_a_list_so_it_must_be_even():
    data = tiny(partial_rotary_factors=None)
    (problem,) = problems_of({**data, "head_dim": 7})
    assert (problem.field, problem.expected, problem.found) == ("head_dim", "an even number", "7")


@pytest.mark.parametrize("data", [None, [], "config", 3, {}, {1: 2}, {"text_config": {}}])
def test_what_is_no_config_at_all_is_refused(data):
    assert problems_of(data)


def test_a_key_that_is_half_a_character():
    (problem,) = problems_of(tiny() | {"\ud800": 1})
    assert str(problem) == 'expected keys of whole characters, found "\\ud800"'


def test_a_dictionary_nested_beyond_pythons_recursion_limit_is_refused():
    nested = {}
    for _ in range(5000):
        nested = {"a": nested}
    (problem,) = problems_of(tiny(note=nested))
    assert problem.field.startswith("note.a") and "levels of nesting" in problem.expected


def test_lists_are_kept_as_deep_as_is_allowed_and_no_deeper():
    lists = "kept"
    for _ in range(63):
        lists = [lists]
    # The config itself is the 64th level.
    assert Step35Config.from_dict(tiny(note=lists)).to_dict()["note"] == lists
    for _ in range(5000):
        lists = [lists]
    (problem,) = problems_of(tiny(note=lists))
    assert problem.field.startswith("note[0]") and "64 levels of nesting" in problem.expected


JUNK = (None, True, -1, 0, 2.5, 10**30, float("nan"), "", "x,1", [], [[]], {}, {"a": 1}, object())


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_in_a_config_it_is_legal_or_the_error_is_ours(seed):
    rng = random.Random(seed)
    for _ in range(15):
        data = rng.choice((published, tiny, resaved))()
        for _ in range(rng.randint(1, 4)):
            target = data
            name = rng.choice(list(data))
            while isinstance(target[name], dict | list) and target[name] and rng.random() < 0.7:
                target = target[name]
                name = rng.choice(list(target) if isinstance(target, dict) else range(len(target)))
            if rng.random() < 0.4:
                del target[name]
                break
            target[name] = rng.choice(JUNK)
        try:
            config = Step35Config.from_dict(data)
        except Step35ConfigError as error:
            # To be accepted is as good an end as an error of the right form.
            assert len(str(error).splitlines()) == 1 + len(error.problems)  # noqa: PT017
            # Pydantic's own words name no field of ours.
            assert "Input should" not in str(error)  # noqa: PT017
        else:
            layers = config.num_hidden_layers + config.num_nextn_predict_layers
            assert len(config.layers) == layers
            assert Step35Config.from_dict(config.to_dict()) == config
