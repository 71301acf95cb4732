"""Other spellings of a Step-3.5 config, translated to the published one.

A multimodal config holds the language model's fields in `text_config`, and transformers has
names of its own for some of them (`attribute_map` of its `Step3p7TextConfig`). Standard library
only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from step35_patch.config.errors import ConfigProblem, found_text
from step35_patch.config.resaved import Resaved

# The published name for each other name that means the same.
ALIASES = {
    "num_key_value_heads": "num_attention_groups",
    "n_routed_experts": "moe_num_experts",
    "num_local_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "share_expert_dims": "share_expert_dim",
    "num_mtp_layers": "num_nextn_predict_layers",
    "dtype": "torch_dtype",
}
_WRAPPER = "text_config"
_DTYPES = ("torch_dtype", "dtype")
_WRAPPER_MODEL_TYPES = ("step3p7", "step3p5")
_NEAR_ENOUGH_TO_BE_MEANT = 0.9


def unwrap(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, list[ConfigProblem]]:
    """Take the language model's fields out of a multimodal config; others stay as they are.

    Of a multimodal config only `text_config` counts. Of the outer object are read `model_type`,
    which must be Step's if it is there, and the weights' dtype if `text_config` has none.

    Args:
        data: The config, otherwise unchecked.

    Returns:
        The fields, the prefix of their names in the file (`"text_config."` or empty), and what is
        wrong with the outer object.
    """
    if _WRAPPER not in data:
        return data, "", []
    inner = data[_WRAPPER]
    if not isinstance(inner, Mapping):
        return {}, "", [ConfigProblem(_WRAPPER, "an object", found_text(inner))]
    if not any(inner.get(name) for name in _DTYPES):
        outer = {name: data[name] for name in _DTYPES if name in data}
        inner = {name: value for name, value in inner.items() if name not in _DTYPES} | outer
    outer_type = data.get("model_type", _WRAPPER_MODEL_TYPES[0])
    if outer_type in _WRAPPER_MODEL_TYPES:
        return inner, f"{_WRAPPER}.", []
    expected = " or ".join(found_text(name) for name in _WRAPPER_MODEL_TYPES)
    problem = ConfigProblem("model_type", expected, found_text(outer_type))
    return inner, f"{_WRAPPER}.", [problem]


def canonical(
    data: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str], list[ConfigProblem]]:
    """Translate a config's fields to the published form.

    Args:
        data: The fields as the file has them, lists as tuples, otherwise unchecked.

    Returns:
        The fields under the published names; for each that has another name in the file, that
        name; and the problems, such as two spellings with different values.
    """
    fields = {name: value for name, value in data.items() if name not in ALIASES}
    origins: dict[str, str] = {}
    problems: list[ConfigProblem] = []
    for alias, name in ALIASES.items():
        if alias not in data:
            continue
        value = data[alias]
        if name not in fields:
            fields[name], origins[name] = value, alias
        elif fields[name] != value or type(fields[name]) is not type(value):
            hint = f"{alias} means the same; keep one of the two"
            both = f"{found_text(fields[name])} and {found_text(value)}"
            problems.append(ConfigProblem(name, "one value", both, hint))
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, Mapping) and "type" in scaling:
        rest = {key: value for key, value in scaling.items() if key != "type"}
        if rest.setdefault("rope_type", scaling["type"]) != scaling["type"]:
            both = f"{found_text(rest['rope_type'])} and {found_text(scaling['type'])}"
            hint = "type means the same; keep one of the two"
            problems.append(ConfigProblem("rope_scaling.rope_type", "one value", both, hint))
        fields["rope_scaling"] = rest
    resaved = Resaved(fields)
    return resaved.fields, origins | resaved.origins, [*problems, *resaved.problems]


def misspelt_names(data: Mapping[str, Any], fields: Collection[str]) -> dict[str, str]:
    """For each missing field, the unknown name that can only be meant for it.

    Other unknown names are kept: this is for optional fields, whose absence would otherwise
    quietly mean another model (no clamp, no scaling).

    Args:
        data: The fields of a config, by name.
        fields: The names that are known.
    """
    unknown = [name for name in data if name not in fields]
    missing = [name for name in fields if name not in data]
    near = {name: get_close_matches(name, missing, 1, _NEAR_ENOUGH_TO_BE_MEANT) for name in unknown}
    return {meant[0]: name for name, meant in near.items() if meant}
