"""The config that a checkpoint is of, held against another one: which fields differ, and what then.

Checkpoints carry their config and its fingerprint among Megatron's arguments. Two configs are
compared by what decides the fingerprint, layer by layer, so that spellings don't matter; what
differs has the published names.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from step35_patch.config.errors import ranges
from step35_patch.config.layer_plan import SLIDING_ATTENTION, LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.config.quantization import QUANTIZATION_FIELDS

# Attributes of the arguments that a checkpoint carries.
FINGERPRINT, DOCUMENT = "step35_fingerprint", "step35_config_document"
ACCEPTED = "step35_accept_changed"

_SHAPES = "tensors have other shapes"
_TENSORS = "there are other tensors"
_TRAINED = "the weights were trained for the other value"
_LONGER = "may change for longer sequences"
_STEADIER = "may change to keep activations in bounds"


@dataclass(frozen=True, slots=True)
class ComparedField:
    """A field in which two models can differ.

    Attributes:
        name: In the config.
        reason: Why a run may have another value than the one that the weights were trained with,
            or why it may not.
        may_change: Whether it may.
        of_layer: The attribute of `LayerPlan` that it decides; None for one of the whole model.
    """

    name: str
    reason: str
    may_change: bool = False
    of_layer: str | None = None


# Of the whole model, but without meaning where no layer has experts.
_OF_EXPERTS = (
    ComparedField("moe_num_experts", _SHAPES),
    ComparedField("moe_top_k", _TRAINED),
    ComparedField("moe_intermediate_size", _SHAPES),
    ComparedField("share_expert_dim", _SHAPES),
    ComparedField("moe_router_scaling_factor", _TRAINED),
)
COMPARED = (
    ComparedField("num_hidden_layers", _TENSORS),
    ComparedField("num_nextn_predict_layers", _TENSORS),
    ComparedField("hidden_size", _SHAPES),
    ComparedField("intermediate_size", _SHAPES),
    ComparedField("vocab_size", _SHAPES),
    ComparedField("rms_norm_eps", _TRAINED),
    ComparedField("use_head_wise_attn_gate", _TENSORS),
    *_OF_EXPERTS,
    ComparedField("moe_layers_enum", _TENSORS, of_layer="is_moe"),
    ComparedField("layer_types", _TRAINED, of_layer="attention_type"),
    ComparedField("num_attention_heads", _SHAPES, of_layer="num_attention_heads"),
    ComparedField("num_attention_groups", _SHAPES, of_layer="num_query_groups"),
    ComparedField("head_dim", _SHAPES, of_layer="kv_channels"),
    # Unlike RoPE's base: channels that were a token's content would become its position.
    ComparedField("partial_rotary_factors", _TRAINED, of_layer="rotary_percent"),
    ComparedField("sliding_window", _LONGER, True, "window_size"),
    ComparedField("rope_theta", _LONGER, True, "rotary_base"),
    # How a layer is scaled, and whether it is.
    ComparedField("rope_scaling", _LONGER, True, "rope_scaling"),
    ComparedField("yarn_only_types", _LONGER, True, "rope_scaling"),
    ComparedField("swiglu_limits", _STEADIER, True, "swiglu_limit"),
    ComparedField("swiglu_limits_shared", _STEADIER, True, "swiglu_limit_shared"),
)
MAY_CHANGE = tuple(field.name for field in COMPARED if field.may_change)
# What follows from a layer's type, where that differs already.
_OF_TYPE = ("num_attention_heads", "window_size", "rope_scaling")


class Difference(NamedTuple):
    """A field in which two configs differ, and how.

    Attributes:
        row: The field.
        name: Its name, or of what differs in it, with dots.
        old: The checkpoint's value, as text.
        new: The other config's.
        layers: The indices of the layers that it is so in; none for a field of the whole model.
    """

    row: ComparedField
    name: str
    old: str
    new: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Here:
    """The other side of a comparison with a checkpoint, in words.

    Attributes:
        place: Where its config is, such as "in this run".
        option: Which accepts differences.
    """

    place: str
    option: str

    def told(self, difference: Difference) -> str:
        """A difference without what to do about it."""
        _, name, old, new, layers = difference
        where = f" (layers {ranges(layers)})" if layers else ""
        return f"{name}: {old} in the checkpoint, {new} {self.place}{where}"

    def problem(self, difference: Difference) -> str:
        """A difference that is not accepted, and what to do."""
        row = difference.row
        if row.may_change:
            what = f"it {row.reason}: if that is meant, {self.option} {row.name}"
        else:
            what = (
                f"{row.reason}: give the checkpoint's config, or convert weights of this one again"
            )
        return f"{self.told(difference)}; {what}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checkpoint's config held against another one.

    Attributes:
        problems: What is not accepted, and options without effect: a line each, with what to do.
        accepted: The differences that are, a line each.
    """

    problems: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()


def recorded(config: Step35Config) -> dict[str, str]:
    """What a checkpoint of a config carries of it, by the names of the arguments.

    How the weights were stored that it was made from is nothing of the model's.
    """
    fields = {
        name: value for name, value in config.to_dict().items() if name not in QUANTIZATION_FIELDS
    }
    document = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return {FINGERPRINT: config.fingerprint, DOCUMENT: document}


def not_acceptable(names: Iterable[str], option: str) -> list[Problem]:
    """One for each name that no checkpoint's difference can be accepted by.

    Args:
        names: Of fields.
        option: That they were given with.
    """
    rows = {row.name: row for row in COMPARED}
    return [
        Problem(
            option,
            f"some of {', '.join(MAY_CHANGE)}",
            name,
            rows[name].reason if name in rows else "no field of a config is compared by this name",
        )
        for name in names
        if name not in MAY_CHANGE
    ]


def compare(args: object, wanted: Step35Config, accept: Collection[str], here: Here) -> Comparison:
    """Hold the config that a checkpoint's arguments carry against another one.

    Args:
        args: The arguments that Megatron saved; without the package's entries there is nothing
            to compare.
        wanted: The other config.
        accept: Names of fields, of `MAY_CHANGE`, that may differ.
        here: Where the other config is, for messages.
    """
    found = _config(getattr(args, DOCUMENT, None))
    # Of the document as this version makes it, which another one may do otherwise.
    fingerprint = getattr(args, FINGERPRINT, None) if found is None else found.fingerprint
    differing: tuple[Difference, ...] = ()
    if fingerprint not in (None, wanted.fingerprint):
        differing = () if found is None else differences(found, wanted)
        if not differing:
            return Comparison((_sums(fingerprint, wanted, here),))
    # A run that is started again from its own checkpoint has accepted them before.
    before = getattr(args, ACCEPTED, None)
    known = [difference.row.name for difference in differing]
    known += before if isinstance(before, list) else []
    problems = [here.problem(d) for d in differing if d.row.name not in accept]
    problems += [
        f"{here.option} {name}: expected a field that differs, found none: leave it out"
        for name in accept
        if name not in known
    ]
    accepted = (here.told(d) for d in differing if d.row.name in accept)
    return Comparison(tuple(problems), tuple(accepted))


def _config(document: object) -> Step35Config | None:
    """The config of a document, or None if it is not one that this version reads."""
    if not isinstance(document, str):
        return None
    try:
        return Step35Config.from_dict(json.loads(document))
    except (ValueError, RecursionError):  # Step35ConfigError is a ValueError
        return None


def _sums(fingerprint: object, wanted: Step35Config, here: Here) -> str:
    found = fingerprint if isinstance(fingerprint, str) else reprlib.repr(fingerprint)
    return (
        f"config fingerprint: {found} in the checkpoint, {wanted.fingerprint} {here.place}; the "
        "checkpoint carries no config that would tell which fields differ: give the config that it "
        "was saved with (what such a run saves carries it), or convert the published weights again"
    )


def differences(found: Step35Config, wanted: Step35Config) -> tuple[Difference, ...]:
    """Where two configs describe different models, in the table's order.

    Layers that only one of them has are not listed, since their number is.

    Args:
        found: A checkpoint's.
        wanted: The other one.
    """
    both_have_experts = all(any(plan.is_moe for plan in c.layers) for c in (found, wanted))
    # Both decide the plans' one scaling: the one field how, the other which layers.
    same = "rope_scaling" if found.rope_scaling == wanted.rope_scaling else "yarn_only_types"
    pairs = list(_pairs(found, wanted))
    places: dict[tuple[ComparedField, str, str, str], list[int]] = {}
    for row in COMPARED:
        if row.of_layer is None:
            was, now = (json.dumps(getattr(config, row.name)) for config in (found, wanted))
            if was != now and (both_have_experts or row not in _OF_EXPERTS):
                places[row, row.name, was, now] = []
            continue
        for old, new in pairs if row.name != same else ():
            for name, was, now in _in_layer(row, row.of_layer, old, new):
                places.setdefault((row, name, was, now), []).append(new.index)
    return tuple(Difference(*key, tuple(indices)) for key, indices in places.items())


def _pairs(found: Step35Config, wanted: Step35Config) -> Iterator[tuple[LayerPlan, LayerPlan]]:
    """The layers that both have: decoder layers by index, MTP layers by depth."""
    for is_mtp in (False, True):
        yield from zip(
            (plan for plan in found.layers if plan.is_mtp == is_mtp),
            (plan for plan in wanted.layers if plan.is_mtp == is_mtp),
            strict=False,
        )


def _in_layer(
    row: ComparedField, attribute: str, old: LayerPlan, new: LayerPlan
) -> Iterator[tuple[str, str, str]]:
    """Name and values, as text, of what differs between two layers in a field."""
    name, was, now = row.name, getattr(old, attribute), getattr(new, attribute)
    if was == now or (attribute in _OF_TYPE and old.attention_type != new.attention_type):
        return
    if attribute == "rope_scaling" and was is not None and now is not None:
        for key, value in dataclasses.asdict(was).items():
            if value != getattr(now, key):
                yield f"{name}.{key}", json.dumps(value), json.dumps(getattr(now, key))
        return
    if attribute == "num_attention_heads" and new.attention_type == SLIDING_ATTENTION:
        name = f"attention_other_setting.{name}"
    yield name, _text(attribute, was), _text(attribute, now)


def _text(attribute: str, value: Any) -> str:
    """A value of a layer's plan in the config's words."""
    if attribute == "is_moe":
        return "MoE" if value else "dense"
    if attribute == "rope_scaling":
        return "not scaled" if value is None else "scaled"
    if attribute == "window_size" and value is not None:
        return f"{value[0] + 1}"  # W keys, as `Step35Config.layers` has it
    return json.dumps(value)
