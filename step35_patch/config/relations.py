"""The checks of a config's fields against one another.

`Step35Config` checks each field by itself. The checks here take a mapping that holds only the
fields that are right by themselves, so that one wrong field neither hides nor causes problems
elsewhere. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from step35_patch.config.errors import ConfigProblem, found_text
from step35_patch.config.layer_plan import FULL_ATTENTION, SLIDING_ATTENTION
from step35_patch.config.layer_values import Values, expand_layer_types, numbers_by_type

PER_LAYER_LISTS = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)
_MOE_SIZES = ("moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim")


def relation_problems(values: Values) -> list[ConfigProblem]:
    """Every way in which the fields of `values` do not fit together.

    Args:
        values: The fields that are valid by themselves, under their published names; a field
            with a problem of its own is left out.
    """
    known = dict(values)
    problems = _length_problems(known)
    for problem in problems:
        known.pop(problem.field)
    for check in _CHECKS:
        problems += check(known)
    return problems


def _has(values: Values, *names: str) -> bool:
    return all(name in values for name in names)


def _length_problems(values: Values) -> list[ConfigProblem]:
    if not _has(values, "num_hidden_layers", "num_nextn_predict_layers"):
        return []
    decoder, mtp = values["num_hidden_layers"], values["num_nextn_predict_layers"]
    expected = f"a list of {decoder} entries (num_hidden_layers)"
    hint = "MTP layers have entries only if num_nextn_predict_layers counts them"
    if mtp:
        expected = f"a list of {decoder} (num_hidden_layers) or {decoder + mtp} entries"
        hint = f"the longer form has the {mtp} MTP layers at the end"
    return [
        ConfigProblem(name, expected, f"a list of {len(values[name])}", hint)
        for name in PER_LAYER_LISTS
        if isinstance(values.get(name), tuple) and len(values[name]) not in (decoder, decoder + mtp)
    ]


def _heads(values: Values) -> list[ConfigProblem]:
    heads, groups = values.get("num_attention_heads"), values.get("num_attention_groups")
    if heads and groups and heads % groups:
        expected = f"a multiple of num_attention_groups ({groups})"
        return [ConfigProblem("num_attention_heads", expected, found_text(heads))]
    return []


def _sliding_layers(values: Values) -> list[ConfigProblem]:
    problems: list[ConfigProblem] = []
    setting = values.get("attention_other_setting")
    if _has(values, "layer_types", "num_hidden_layers", "num_nextn_predict_layers"):
        types = expand_layer_types(values)
        number = types.count(SLIDING_ATTENTION)
        why = f"as {number} layers are {SLIDING_ATTENTION}"
        if number and SLIDING_ATTENTION not in values["layer_types"]:
            why = f"as the {number} MTP layers, without entries in layer_types, are sliding"
        if number and values.get("sliding_window", 0) is None:
            expected = f"a positive integer (keys), {why}"
            problems.append(ConfigProblem("sliding_window", expected, "nothing"))
        if number and "attention_other_setting" in values and setting is None:
            expected = f"an object with the sliding layers' heads, {why}"
            problems.append(ConfigProblem("attention_other_setting", expected, "nothing"))
    if setting is None:
        return problems
    name = "attention_other_setting"
    for key, main in (
        ("num_attention_groups", "num_attention_groups"),
        ("head_dim", "head_dim"),
        ("true_head_dim", "head_dim"),
    ):
        found = getattr(setting, key)
        if found is not None and _has(values, main) and found != values[main]:
            expected = f"{values[main]}, the model's {main}"
            hint = "only the number of query heads can differ between the layer types"
            problems.append(ConfigProblem(f"{name}.{key}", expected, found_text(found), hint))
    groups = values.get("num_attention_groups")
    if groups and setting.num_attention_heads % groups:
        expected = f"a multiple of num_attention_groups ({groups})"
        found = found_text(setting.num_attention_heads)
        problems.append(ConfigProblem(f"{name}.num_attention_heads", expected, found))
    return problems


def _mtp_rope(values: Values) -> list[ConfigProblem]:
    needed = ("layer_types", "num_hidden_layers", "num_nextn_predict_layers")
    if not _has(values, *needed):
        return []
    types = expand_layer_types(values)
    problems: list[ConfigProblem] = []
    for name in ("rope_theta", "partial_rotary_factors"):
        given = values.get(name)
        if not isinstance(given, tuple):
            continue
        numbers = numbers_by_type(types, given)
        for layer_type in dict.fromkeys(types[len(given) :]):
            if len(numbers[layer_type]) != 1:
                several = found_text(sorted(numbers[layer_type]))
                found = f"for the {layer_type} layers of the decoder {several}"
                expected = f"entries for the MTP layers, a list of {len(types)}"
                hint = "the shorter form needs one value for all layers of their type"
                problems.append(ConfigProblem(name, expected, found, hint))
    return problems


def _rotated_dimensions(values: Values) -> list[ConfigProblem]:
    factors = values.get("partial_rotary_factors")
    if not factors or "head_dim" not in values:
        if factors is None and values.get("head_dim", 0) % 2:
            return [ConfigProblem("head_dim", "an even number", found_text(values["head_dim"]))]
        return []
    head_dim: int = values["head_dim"]
    problems: list[ConfigProblem] = []
    for index, factor in enumerate(factors):
        product = head_dim * factor
        rotated = int(product)  # as the reference and Megatron-Core have it
        if rotated < 2 or rotated % 2 or abs(product - rotated) > 1e-6:
            expected = f"a share of head_dim ({head_dim}) that is a whole, even number"
            found = f"{found_text(factor)}, which gives {product:g}"
            problems.append(ConfigProblem(f"partial_rotary_factors[{index}]", expected, found))
    return problems


def _rope_scaling(values: Values) -> list[ConfigProblem]:
    scaling = values.get("rope_scaling")
    problems: list[ConfigProblem] = []
    if scaling is None:
        return problems
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        expected = f"less than high_freq_factor ({scaling.high_freq_factor:g})"
        found = found_text(scaling.low_freq_factor)
        problems.append(ConfigProblem("rope_scaling.low_freq_factor", expected, found))
    if "yarn_only_types" in values and not values["yarn_only_types"]:
        expected = "a list of the layer types that rope_scaling applies to"
        found = "nothing" if values["yarn_only_types"] is None else "[]"
        hint = f'the published model has ["{FULL_ATTENTION}"]; without scaling, drop rope_scaling'
        problems.append(ConfigProblem("yarn_only_types", expected, found, hint))
    return problems


def _experts(values: Values) -> list[ConfigProblem]:
    if not _has(values, "use_moe", "moe_layers_enum"):
        return []
    layers: tuple[int, ...] | None = values["moe_layers_enum"]
    problems: list[ConfigProblem] = []
    if layers is None:
        if values["use_moe"]:
            expected = "the indices of the MoE layers, as use_moe is true"
            hint = "a model without any has use_moe false"
            problems.append(ConfigProblem("moe_layers_enum", expected, "nothing", hint))
        return problems
    if layers and not values["use_moe"]:
        expected = "no MoE layers, as use_moe is false"
        problems.append(ConfigProblem("moe_layers_enum", expected, found_text(layers)))
    decoder = values.get("num_hidden_layers")
    for position, index in enumerate(layers):
        field = f"moe_layers_enum[{position}]"
        if index in layers[:position]:
            problems.append(ConfigProblem(field, "each layer once", f"{index} again"))
        if decoder is not None and index >= decoder:
            expected = f"a decoder layer, 0 to {decoder - 1}"
            is_mtp = index < decoder + values.get("num_nextn_predict_layers", 0)
            hint = "MTP layers are dense" if is_mtp else ""
            problems.append(ConfigProblem(field, expected, found_text(index), hint))
    if not layers:
        return problems
    why = f"as {len(layers)} layers have experts"
    for name in _MOE_SIZES:
        if name in values and not values[name]:
            found = "nothing" if values[name] is None else found_text(values[name])
            problems.append(ConfigProblem(name, f"a positive integer, {why}", found))
    if values.get("moe_router_scaling_factor", 1) is None:
        hint = "the published model has 3.0; the reference would take 1.0"
        expected = f"a positive number, {why}"
        problems.append(ConfigProblem("moe_router_scaling_factor", expected, "nothing", hint))
    top_k, experts = values.get("moe_top_k"), values.get("moe_num_experts")
    if top_k and experts and top_k > experts:
        expected = f"at most moe_num_experts ({experts})"
        problems.append(ConfigProblem("moe_top_k", expected, found_text(top_k)))
    return problems


def _attention_scale(values: Values) -> list[ConfigProblem]:
    scalar = values.get("query_pre_attn_scalar")
    if scalar is None or "head_dim" not in values or scalar == values["head_dim"]:
        return []
    expected = f"{values['head_dim']}, the model's head_dim"
    return [ConfigProblem("query_pre_attn_scalar", expected, found_text(scalar))]


_CHECKS: tuple[Callable[[Values], list[ConfigProblem]], ...] = (
    _heads,
    _sliding_layers,
    _mtp_rope,
    _rotated_dimensions,
    _rope_scaling,
    _experts,
    _attention_scale,
)
