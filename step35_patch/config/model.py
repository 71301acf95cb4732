"""`Step35Config`: a Step-3.5 config.json, checked as a whole before any model is built.

The fields and their spellings are those of the published config.json. A field that has a default
here has the default of the reference (transformers' `Step3p7TextConfig`) or is one that the
reference does not read and computes only one way; a field whose absence would make another
model is required. The per-layer numbers are in `Step35Config.layers`, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from step35_patch.config.aliases import canonical, misspelt_names, unwrap
from step35_patch.config.errors import ConfigProblem, Step35ConfigError, found_text
from step35_patch.config.fields import (
    NESTED_MODELS,
    AttentionOtherSettingOrNone,
    Count,
    Dtype,
    Flag,
    LayerCount,
    LayerIndices,
    LayerTypes,
    LayerTypesOrNone,
    Limits,
    MtpCount,
    NoLayers,
    PositiveFloat,
    PositiveInt,
    RopeScalingOrNone,
    RopeTheta,
    Shares,
    StrictModel,
    Texts,
    TokenId,
    TokenIds,
    only,
)
from step35_patch.config.layer_plan import (
    FULL_ATTENTION,
    LAYER_TYPES,
    SLIDING_ATTENTION,
    LayerPlan,
    Window,
)
from step35_patch.config.layer_values import expand_by_type, expand_layer_types, expand_limits
from step35_patch.config.reading import freeze, json_problems, read_json
from step35_patch.config.relations import PER_LAYER_LISTS, relation_problems

__all__ = ["Step35Config", "Step35ConfigError", "Window", "packaged_config_path"]


class Step35Config(StrictModel):
    """A checked, immutable Step-3.5 config under the published field names.

    Lists are tuples; unknown fields are kept and are attributes too. The object pickles, copies
    and hashes. Make one with `from_pretrained`, `from_dict` or keyword arguments; each raises
    `Step35ConfigError` with every problem of the config.

    A per-layer list has `num_hidden_layers` entries, or `num_nextn_predict_layers` more for the
    MTP layers. Where those are missing, an MTP layer is a sliding one, has the `rope_theta` and
    `partial_rotary_factors` of the decoder's layers of its type (which must agree), and no clamp.
    """

    model_type: Annotated[str, *only("step3p5")]
    architectures: Texts = None
    # Decides the published tensors' bytes, not what is computed.
    torch_dtype: Dtype

    num_hidden_layers: LayerCount
    num_nextn_predict_layers: MtpCount = 0
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    max_seq_len: PositiveInt | None = None
    rms_norm_eps: PositiveFloat

    layer_types: LayerTypes
    num_attention_heads: PositiveInt
    num_attention_groups: PositiveInt
    head_dim: PositiveInt
    attention_other_setting: AttentionOtherSettingOrNone = None
    sliding_window: PositiveInt | None = None
    use_head_wise_attn_gate: Flag = True

    rope_theta: RopeTheta
    partial_rotary_factors: Shares = None
    rope_scaling: RopeScalingOrNone = None
    yarn_only_types: LayerTypesOrNone = None

    swiglu_limits: Limits = None
    swiglu_limits_shared: Limits = None

    use_moe: Flag = True
    moe_layers_enum: LayerIndices = None
    moe_num_experts: Count | None = None
    moe_top_k: Count | None = None
    moe_intermediate_size: Count | None = None
    share_expert_dim: Count | None = None
    moe_router_scaling_factor: PositiveFloat | None = None

    # What the reference computes in one way only.
    att_impl_type: Annotated[str, *only("GQA")] = "GQA"
    attention_bias: Annotated[bool, *only(False)] = False
    attention_dropout: Annotated[float, *only(0.0)] = 0.0
    hidden_act: Annotated[str, *only("silu")] = "silu"
    mlp_bias: Annotated[bool, *only(False)] = False
    moe_every_n_layer: Annotated[int, *only(1)] = 1
    moe_layer_offset: Annotated[int, *only(0)] = 0
    moe_router_activation: Annotated[str, *only("sigmoid")] = "sigmoid"
    need_fp32_gate: Annotated[bool, *only(True)] = True
    norm_expert_weight: Annotated[bool, *only(True)] = True
    query_pre_attn_scalar: PositiveFloat | None = None
    sink: Annotated[bool, *only(False)] = False
    tie_word_embeddings: Annotated[bool, *only(False)] = False
    use_bidirectional_attention: Annotated[bool, *only(False)] = False
    use_moe_router_bias: Annotated[bool, *only(True)] = True
    use_qk_norm: Annotated[bool, *only(True)] = True
    use_rope_layers: NoLayers = ()
    zero_centered: Annotated[bool, *only(True)] = True

    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds | None = None
    pad_token_id: TokenId | None = None

    _source: str = PrivateAttr()

    def __init__(self, /, **data: Any) -> None:
        problems = json_problems(data)
        unusable = {_top_name(problem.field) for problem in problems}
        document = freeze(data)
        fields, origins, more = canonical(document)
        problems += more
        valid: dict[str, Any] = {}
        meant = misspelt_names(fields, type(self).model_fields)
        try:
            self.__pydantic_validator__.validate_python(fields, self_instance=self, context=valid)
        except ValidationError as error:
            elsewhere = {(name,) for name in origins}
            found = [
                _problem(details, meant)
                for details in error.errors(include_url=False)
                # Under another name it is there; why it could not be read is a problem already.
                if details["type"] != "missing" or details["loc"] not in elsewhere
            ]
            problems += [p for p in found if p.field not in {q.field for q in problems}]
        for name, field in type(self).model_fields.items():
            if name in fields or name in origins or field.is_required():
                continue
            if name in meant:
                problems.append(_misspelt(name, field.description or "this field", meant[name]))
            else:
                valid[name] = field.default
        usable = {name: value for name, value in valid.items() if name not in unusable}
        problems += relation_problems(usable)
        if problems:
            raise Step35ConfigError(_with_spelling(problems, origins))
        self._source = json.dumps(document)

    @field_validator("*", mode="after")
    @classmethod
    def _collect_valid(cls, value: Any, info: ValidationInfo) -> Any:
        if info.context is not None:
            info.context[info.field_name] = value
        return value

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Read a config.json.

        Args:
            path: The file, or a folder that holds it.

        Raises:
            Step35ConfigError: The file is missing, not a JSON object, or describes a model that
                this package does not compute. All problems of the file are in it.
        """
        file, data, problems = read_json(path)
        try:
            config = cls.from_dict(data)
        except Step35ConfigError as error:
            problems += error.problems
        if problems:
            raise Step35ConfigError(problems, str(file)) from None
        return config

    def to_cfg_dict(self) -> dict[str, Any]:
        """What Megatron-Bridge writes into a run_config.yaml to make the config again."""
        return {
            "_target_": f"{__name__}.{type(self).__name__}.from_dict",
            "_call_": True,
            "data": self.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Check a config that is a dictionary already.

        Args:
            data: The fields, or a multimodal config with them in `text_config`.

        Raises:
            Step35ConfigError: As for `from_pretrained`.
        """
        if not isinstance(data, Mapping):
            raise Step35ConfigError([ConfigProblem("", "a JSON object", found_text(data))])
        fields, prefix, problems = unwrap(data)
        wrong = [key for key in fields if not isinstance(key, str)]
        if wrong:
            problem = ConfigProblem("", "names that are strings", found_text(wrong[0]))
            raise Step35ConfigError([*problems, problem])
        try:
            config = cls(**fields)
        except Step35ConfigError as error:
            named = [dataclasses.replace(p, field=prefix + p.field) for p in error.problems]
            raise Step35ConfigError([*problems, *named]) from None
        if problems:
            raise Step35ConfigError(problems)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The JSON object this was made from, unknown fields included, as a new dictionary.

        Of a multimodal config it is the `text_config`: what describes this model's weights.
        """
        document: dict[str, Any] = json.loads(self._source)
        return document

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A config with some fields replaced, checked like any other.

        Args:
            update: The new values, by the names that the file has.
            deep: Makes no difference, as nothing in a config can change.

        Raises:
            Step35ConfigError: As for `from_pretrained`.
        """
        return type(self)(**{**self.to_dict(), **(update or {})})

    def without_mtp(self) -> Self:
        """The config of the same model without its MTP layers, in the spelling of the file.

        Per-layer lists end with the decoder's layers.
        """
        document = self.to_dict()
        for name in PER_LAYER_LISTS:
            if isinstance(document.get(name), list):
                document[name] = document[name][: self.num_hidden_layers]
        for name in _OF_MTP:
            document.pop(name, None)
        return type(self)(**(document | {"num_nextn_predict_layers": 0}))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The plan of each layer, MTP layers at the end, with the reference's window of W keys."""
        return self.resolve("hf")

    def resolve(self, window: Window) -> tuple[LayerPlan, ...]:
        """The plan of each layer, `num_hidden_layers + num_nextn_predict_layers` of them.

        Args:
            window: Which keys a sliding query sees, with W = `sliding_window`: `"hf"`, W keys,
                itself included, window_size (W-1, 0), as the reference; `"steptron"`, W+1
                keys, window_size (W, 0), as StepFun's own trainer.

        Raises:
            ValueError: `window` is neither.
        """
        if window not in get_args(Window):
            raise ValueError(f'window: expected "hf" or "steptron", found {found_text(window)}')
        values = dict(self)
        columns = zip(
            expand_layer_types(values),
            expand_by_type(values, "rope_theta"),
            expand_by_type(values, "partial_rotary_factors"),
            expand_limits(values, "swiglu_limits"),
            expand_limits(values, "swiglu_limits_shared"),
            strict=True,
        )
        heads = {FULL_ATTENTION: self.num_attention_heads}
        windows: dict[str, tuple[int, int] | None] = {FULL_ATTENTION: None}
        # Both are there if there are sliding layers: `relation_problems` has seen to it.
        if self.attention_other_setting is not None:
            heads[SLIDING_ATTENTION] = self.attention_other_setting.num_attention_heads
        if self.sliding_window is not None:
            windows[SLIDING_ATTENTION] = (self.sliding_window - (window == "hf"), 0)
        plans = []
        for index, (layer_type, base, percent, limit, limit_shared) in enumerate(columns):
            plans.append(
                LayerPlan(
                    index=index,
                    is_mtp=index >= self.num_hidden_layers,
                    is_moe=index in (self.moe_layers_enum or ()),
                    attention_type=layer_type,
                    num_attention_heads=heads[layer_type],
                    num_query_groups=self.num_attention_groups,
                    kv_channels=self.head_dim,
                    window_size=windows[layer_type],
                    rotary_base=base,
                    rotary_percent=percent,
                    rope_scaling=(
                        self.rope_scaling if layer_type in (self.yarn_only_types or ()) else None
                    ),
                    swiglu_limit=limit,
                    swiglu_limit_shared=limit_shared,
                )
            )
        return tuple(plans)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, as hex, over what decides the numbers that a model of this config computes.

        Two spellings of one model have one fingerprint; token ids, dtype, context length and
        unknown fields are not in it.
        """
        names: tuple[str, ...] = _MODEL_FIELDS
        if any(plan.is_moe for plan in self.layers):
            names += _MOE_FIELDS
        content = {name: getattr(self, name) for name in names}
        content["layers"] = [dataclasses.astuple(plan) for plan in self.layers]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Fields that only speak of MTP layers, beside num_nextn_predict_layers.
_OF_MTP = ("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types")
_MODEL_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "use_head_wise_attn_gate",
)
_MOE_FIELDS = (
    "moe_num_experts",
    "moe_top_k",
    "moe_intermediate_size",
    "share_expert_dim",
    "moe_router_scaling_factor",
)


def packaged_config_path() -> Path:
    """The published Step-3.5-Flash config.json, as it comes with this package."""
    return Path(__file__).parents[1] / "data" / "step-3.5-flash.json"


def _problem(details: ErrorDetails, meant: Mapping[str, str]) -> ConfigProblem:
    """One of pydantic's errors in this package's words."""
    model: type[BaseModel] | None = Step35Config
    name, description = "", ""
    for part in details["loc"]:
        if isinstance(part, int):
            name, description = f"{name}[{part}]", ""
        elif model is not None:
            name = f"{name}.{part}" if name else part
            description = model.model_fields[part].description or ""
            model = NESTED_MODELS.get(part)
    expected = description or details["msg"]
    if details["type"] == "expected":
        expected = details["msg"]
    if details["type"] == "missing":
        if name in meant:
            return _misspelt(name, expected, meant[name])
        return ConfigProblem(name, expected, "nothing", "the field is required")
    hint = ""
    if name.startswith(("layer_types[", "yarn_only_types[")):
        hint = _nearest_layer_type(details["input"])
    return ConfigProblem(name, expected, found_text(details["input"]), hint)


def _nearest_layer_type(found: object) -> str:
    """A hint that names the legal layer type closest to `found`, or an empty string."""
    if not isinstance(found, str):
        return ""
    near = get_close_matches(found.lower(), LAYER_TYPES, 1, 0.4)
    return f'did you mean "{near[0]}"?' if near else ""


def _top_name(field: str) -> str:
    return re.split(r"[.\[]", field)[0]


def _misspelt(name: str, expected: str, found: str) -> ConfigProblem:
    return ConfigProblem(name, expected, f"nothing, but {found_text(found)}", "rename it")


def _with_spelling(
    problems: list[ConfigProblem], origins: Mapping[str, str]
) -> Iterator[ConfigProblem]:
    """Say which name a field has in the file, where that is not the published one."""
    for problem in problems:
        origin = origins.get(_top_name(problem.field))
        if origin:
            hint = "; ".join(filter(None, (problem.hint, f"it is {origin} in this file")))
            problem = dataclasses.replace(problem, hint=hint)
        yield problem
