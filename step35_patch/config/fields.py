"""The types of a config's fields: strict, immutable, and each able to say what it expects.

Numbers are not converted (true is no 1, "45" no 45), except that an integer may stand for a
number with a fraction. Lists are tuples by the time they come here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from step35_patch.config.errors import found_text
from step35_patch.config.layer_plan import LAYER_TYPES, SLIDING_ATTENTION, RopeScaling


def expecting(text: str) -> tuple[Any, ...]:
    """Annotations that name a type's whole condition in its error, whichever part failed.

    Args:
        text: What is expected.
    """

    def rename(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", text) from None

    return Field(description=text), WrapValidator(rename)


def only(value: Any) -> tuple[Any, ...]:
    """Annotations of a field for which this package, like the reference, knows one value.

    Args:
        value: The one value, compared once the field has its type.
    """

    def check(found: Any) -> Any:
        if found != value:
            raise ValueError
        return found

    text = f"{found_text(value)}, as the reference computes nothing else"
    return AfterValidator(check), *expecting(text)


def one_of(*names: str) -> tuple[Any, ...]:
    """Annotations of a field that is one of a few names.

    Args:
        names: All that are legal.
    """

    def check(found: str) -> str:
        if found not in names:
            raise ValueError
        return found

    return AfterValidator(check), *expecting(" or ".join(map(found_text, names)))


def _split_indices(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    entries = [entry.strip() for entry in value.split(",")] if value.strip() else []
    return tuple(int(e) if re.fullmatch("[0-9]{1,9}", e) else e for e in entries)


def _number_or_list(value: Any) -> str:
    """Which of two types is meant, so that an error speaks of that one alone."""
    return "list" if isinstance(value, tuple) else "number"


PositiveInt = Annotated[int, Field(gt=0), *expecting("a positive integer")]
Count = Annotated[int, Field(ge=0), *expecting("an integer of at least 0")]
# Far above any model; without a bound a mistyped count would ask for a table that fills the memory.
LayerCount = Annotated[int, Field(gt=0, le=9999), *expecting("an integer from 1 to 9999")]
MtpCount = Annotated[int, Field(ge=0, le=9999), *expecting("an integer from 0 to 9999")]
LayerIndex = Annotated[int, Field(ge=0), *expecting("a layer index from 0")]
PositiveFloat = Annotated[float, Field(gt=0), *expecting("a positive, finite number")]
Share = Annotated[float, Field(gt=0, le=1), *expecting("a number above 0 and at most 1")]
Limit = Annotated[float, Field(ge=0), *expecting("a finite number of at least 0, or null")]
Flag = Annotated[bool, *expecting("true or false")]
TokenId = Annotated[int, *expecting("a token id (an integer), or null")]
Text = Annotated[str, *expecting("a string")]
LayerType = Annotated[str, *one_of(*LAYER_TYPES)]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"], *expecting('"bfloat16", "float16" or "float32"')
]
LayerTypes = Annotated[
    tuple[LayerType, ...], Field(description="a list of layer types, one for each layer")
]
LayerTypesOrNone = Annotated[
    tuple[LayerType, ...] | None, Field(description="a list of layer types, or null")
]
Shares = Annotated[
    tuple[Share, ...] | None,
    Field(description="a list of shares, one for each layer, or null"),
]
Limits = Annotated[
    tuple[Limit | None, ...] | None,
    Field(description="a list of limits, one for each layer, or null"),
]


class StrictModel(BaseModel):
    """Immutable; no value is converted; fields that it does not know are kept."""

    model_config = ConfigDict(
        frozen=True, extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class AttentionOtherSetting(StrictModel):
    """The attention shape of the sliding layers (`attention_other_setting`).

    Only the number of query heads can differ from the model's: the reference takes no other
    number from here. Groups and head_dim, if given, must be the model's.
    """

    attention_type: Annotated[str, *only(SLIDING_ATTENTION)]
    num_attention_heads: PositiveInt
    num_attention_groups: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    true_head_dim: PositiveInt | None = None


class RopeScalingFields(StrictModel):
    """`rope_scaling` as it stands in the file; `Step35Config` holds a `RopeScaling`."""

    rope_type: Annotated[str, *only("llama3")]
    factor: Annotated[float, Field(ge=1), *expecting("a finite number of at least 1")]
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    # The reference would let these two override the per-layer lists.
    rope_theta: Annotated[None, *expecting("no such key here, only beside rope_scaling")] = None
    partial_rotary_factor: Annotated[
        None, *expecting("no such key here, only the list partial_rotary_factors")
    ] = None


def _without_default_scaling(value: Any) -> Any:
    is_default = isinstance(value, Mapping) and value.get("rope_type") == "default"
    return None if is_default else value


def _to_rope_scaling(fields: RopeScalingFields | None) -> RopeScaling | None:
    if fields is None:
        return None
    return RopeScaling(**{f.name: getattr(fields, f.name) for f in dataclasses.fields(RopeScaling)})


RopeTheta = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[tuple[PositiveFloat, ...], Tag("list")],
    Discriminator(_number_or_list),
    Field(description="a positive number, or a list of them, one for each layer"),
]
TokenIds = Annotated[
    Annotated[TokenId, Tag("number")] | Annotated[tuple[TokenId, ...], Tag("list")],
    Discriminator(_number_or_list),
]
RopeScalingOrNone = Annotated[
    RopeScaling | None,
    GetPydanticSchema(lambda _, handler: handler(RopeScalingFields | None)),
    BeforeValidator(_without_default_scaling),
    AfterValidator(_to_rope_scaling),
    PlainSerializer(lambda scaling: dataclasses.asdict(scaling) if scaling else None),
    Field(description="an object, or null"),
]
LayerIndices = Annotated[
    tuple[LayerIndex, ...] | None,
    BeforeValidator(_split_indices),
    Field(description="layer indices, as a list or as one string with commas"),
]
AttentionOtherSettingOrNone = Annotated[
    AttentionOtherSetting | None, Field(description="an object, or null")
]
Texts = Annotated[tuple[Text, ...] | None, Field(description="a list of strings, or null")]
NoLayers = Annotated[
    tuple[Any, ...], BeforeValidator(lambda value: () if value is None else value), *only(())
]
NESTED_MODELS: dict[str, type[StrictModel]] = {
    "attention_other_setting": AttentionOtherSetting,
    "rope_scaling": RopeScalingFields,
}
