"""The values of each layer, MTP layers included, that follow from the fields of a config.

The checks of the fields against one another and the layer table both come from here, so that they
cannot disagree. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from step35_patch.config.layer_plan import LAYER_TYPES, SLIDING_ATTENTION

# Fields of a config that are valid by themselves, by their published names.
Values = Mapping[str, Any]


def expand_layer_types(values: Values) -> tuple[str, ...]:
    """The type of each layer; MTP layers without an entry are sliding ones.

    Args:
        values: The fields, with `layer_types` and both numbers of layers.
    """
    types: tuple[str, ...] = values["layer_types"]
    return types + (SLIDING_ATTENTION,) * (_num_layers(values) - len(types))


def expand_by_type(values: Values, name: str) -> tuple[float, ...]:
    """A RoPE field (a list, or one number for all layers) as one number for each layer.

    MTP layers without an entry have the number of the decoder layers of their type.

    Args:
        values: The fields, with `name`, `layer_types` and both numbers of layers.
        name: Of the field.

    Raises:
        KeyError: There is no decoder layer of that type, or their numbers differ;
            `relation_problems` refuses such a config.
    """
    given = values[name]
    if not isinstance(given, tuple):  # null, for partial_rotary_factors only: all is rotated
        return (1.0 if given is None else given,) * _num_layers(values)
    types = expand_layer_types(values)
    agreed = {t: min(n) for t, n in numbers_by_type(types, given).items() if len(n) == 1}
    return given + tuple(agreed[layer_type] for layer_type in types[len(given) :])


def expand_limits(values: Values, name: str) -> tuple[float | None, ...]:
    """A clamp list as one limit for each layer; None where nothing is clamped.

    No list, no entry (MTP layers), null and 0 all mean no clamp, as in the reference.

    Args:
        values: The fields, with `name` and both numbers of layers.
        name: Of the field.
    """
    given = values[name] or ()
    missing = _num_layers(values) - len(given)
    return tuple(limit or None for limit in given) + (None,) * missing


def numbers_by_type(types: tuple[str, ...], given: tuple[float, ...]) -> dict[str, set[float]]:
    """The different numbers that the layers of each type are given.

    Args:
        types: Of all layers.
        given: A number for each layer, or for each decoder layer.
    """
    numbers: dict[str, set[float]] = {layer_type: set() for layer_type in LAYER_TYPES}
    for layer_type, number in zip(types, given, strict=False):
        numbers[layer_type].add(number)
    return numbers


def _num_layers(values: Values) -> int:
    decoder: int = values["num_hidden_layers"]
    mtp: int = values["num_nextn_predict_layers"]
    return decoder + mtp
