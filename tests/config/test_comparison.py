"""A checkpoint's config held against another: what differs by name, and what may."""

from __future__ import annotations

import argparse
import contextlib
import random

import pytest
from support.config_samples import FULL, SLIDING, tiny

from step35_patch import Step35Config, Step35ConfigError
from step35_patch.config.comparison import (
    COMPARED,
    MAY_CHANGE,
    Here,
    compare,
    differences,
    not_acceptable,
    recorded,
)

HERE = Here("in this run", "--accept")
_SCALING = tiny()["rope_scaling"]
_OTHER_HEADS = {"attention_type": SLIDING, "num_attention_heads": 8}

# What changes in `tiny`: what is told of it.
CHANGES = [
    ({"hidden_size": 32}, ["hidden_size: 24 in the checkpoint, 32 in this run"]),
    ({"rms_norm_eps": 1e-6}, ["rms_norm_eps: 1e-05 in the checkpoint, 1e-06 in this run"]),
    ({"moe_top_k": 3}, ["moe_top_k: 2 in the checkpoint, 3 in this run"]),
    (
        {"use_head_wise_attn_gate": False},
        ["use_head_wise_attn_gate: true in the checkpoint, false in this run"],
    ),
    (
        {"moe_layers_enum": "3,4,5"},
        ["moe_layers_enum: MoE in the checkpoint, dense in this run (layers 2)"],
    ),
    (
        {
            "use_moe": False,
            "moe_top_k": 3,
            "moe_layers_enum": "",
        },  # which leaves the experts' own fields without meaning
        ["moe_layers_enum: MoE in the checkpoint, dense in this run (layers 2-5)"],
    ),
    (
        {"num_attention_heads": 2},
        ["num_attention_heads: 4 in the checkpoint, 2 in this run (layers 0,3)"],
    ),
    (
        {"attention_other_setting": _OTHER_HEADS},
        [
            "attention_other_setting.num_attention_heads: 6 in the checkpoint, 8 in this run "
            "(layers 1-2,4-7)"
        ],
    ),
    (
        {"sliding_window": 9},
        ["sliding_window: 8 in the checkpoint, 9 in this run (layers 1-2,4-7)"],
    ),
    (
        {"rope_theta": [1e6, 1e4, 1e4, 1e6, 1e4, 1e4, 1e4, 2e4]},
        [
            "rope_theta: 50000.0 in the checkpoint, 1000000.0 in this run (layers 0,3)",
            "rope_theta: 10000.0 in the checkpoint, 20000.0 in this run (layers 7)",
        ],
    ),
    (
        {"rope_scaling": _SCALING | {"factor": 8.0}},
        ["rope_scaling.factor: 2.0 in the checkpoint, 8.0 in this run (layers 0,3)"],
    ),
    (
        {"rope_scaling": None},
        ["rope_scaling: scaled in the checkpoint, not scaled in this run (layers 0,3)"],
    ),
    (
        {"yarn_only_types": [FULL, SLIDING]},
        ["yarn_only_types: not scaled in the checkpoint, scaled in this run (layers 1-2,4-7)"],
    ),
    (
        {"partial_rotary_factors": [1.0] * 8},
        ["partial_rotary_factors: 0.5 in the checkpoint, 1.0 in this run (layers 0,3)"],
    ),
    (
        {"swiglu_limits": None},
        ["swiglu_limits: 0.5 in the checkpoint, null in this run (layers 3)"],
    ),
    (
        {"num_nextn_predict_layers": 1, "layer_types": tiny()["layer_types"][:7]}
        | {name: tiny()[name][:7] for name in ("rope_theta", "partial_rotary_factors")}
        | {name: tiny()[name][:7] for name in ("swiglu_limits", "swiglu_limits_shared")},
        ["num_nextn_predict_layers: 2 in the checkpoint, 1 in this run"],
    ),
    # A layer's heads, window and scaling follow from its type.
    (
        {
            "layer_types": [FULL, FULL, *tiny()["layer_types"][2:]],
            "rope_theta": [5e4, 5e4, *tiny()["rope_theta"][2:]],
        },
        [
            'layer_types: "sliding_attention" in the checkpoint, "full_attention" in this run '
            "(layers 1)",
            "rope_theta: 10000.0 in the checkpoint, 50000.0 in this run (layers 1)",
        ],
    ),
]


def config_of(**changes) -> Step35Config:
    return Step35Config.from_dict(tiny(**changes))


def checkpoint(config: Step35Config, **more) -> argparse.Namespace:
    return argparse.Namespace(**recorded(config), **more)


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_fields_that_differ_are_named(change, told):
    found = differences(config_of(), config_of(**change))
    assert [HERE.told(difference) for difference in found] == told


def test_spellings_of_one_model_do_not_differ():
    for change in (
        {"torch_dtype": "bfloat16", "note": 1, "max_position_embeddings": 1024},
        {"moe_layers_enum": "2,3,4,5"},
        {"swiglu_limits": [None, None, None, 0.5, None, None]},
        {"rope_theta": tiny()["rope_theta"][:6]},
    ):
        assert differences(config_of(), config_of(**change)) == ()
        args = checkpoint(config_of())
        assert compare(args, config_of(**change), (), HERE).problems == ()


def test_configs_differ_exactly_where_their_fingerprints_do():
    """Each with up to two of the changes."""
    rng = random.Random(5)
    configs = [config_of()]
    for _ in range(60):
        one, other = rng.choice(CHANGES)[0], rng.choice(CHANGES)[0]
        with contextlib.suppress(Step35ConfigError):  # not all go together
            configs.append(config_of(**(one | other)))
    assert len(configs) > 40
    for found in configs:
        for wanted in configs:
            alike = found.fingerprint == wanted.fingerprint
            assert (differences(found, wanted) == ()) == alike


def test_what_to_do_about_each_difference():
    changed = config_of(rope_theta=2e4, hidden_size=32)
    first, *rest = compare(checkpoint(config_of()), changed, (), HERE).problems
    assert first.startswith("hidden_size: 24 in the checkpoint, 32 in this run; tensors have other")
    assert first.endswith("give the checkpoint's config, or convert weights of this one again")
    assert len(rest) == 2  # full and sliding layers
    for line in rest:
        assert line.endswith(
            "it may change for longer sequences: if that is meant, --accept rope_theta"
        )


def test_accepted_changes():
    longer = config_of(rope_theta=2e4, sliding_window=16)
    args = checkpoint(config_of())
    one = compare(args, longer, ["rope_theta"], HERE)
    assert [line.split(":")[0] for line in one.accepted] == ["rope_theta", "rope_theta"]
    assert [line.split(":")[0] for line in one.problems] == ["sliding_window"]
    both = compare(args, longer, ["sliding_window", "rope_theta"], HERE)
    assert both.problems == ()
    # What differs in no way, but for a run that goes on from a checkpoint of its own.
    idle = "--accept swiglu_limits: expected a field that differs, found none: leave it out"
    assert compare(args, longer, [*MAY_CHANGE[:2], "swiglu_limits"], HERE).problems == (idle,)
    assert compare(argparse.Namespace(), longer, ["swiglu_limits"], HERE).problems == (idle,)
    own = checkpoint(longer, step35_accept_changed=["rope_theta"])
    assert compare(own, longer, ["rope_theta"], HERE) == compare(own, longer, (), HERE)
    assert compare(own, longer, ["sliding_window"], HERE).problems


def test_only_what_leaves_the_weights_their_meaning_can_be_accepted():
    assert {"rope_theta", "rope_scaling", "sliding_window"} < set(MAY_CHANGE)
    assert not_acceptable(MAY_CHANGE, "--accept") == []
    unknown, refused = not_acceptable(["rope_theta", "rope_base", "hidden_size"], "--accept")
    assert unknown.expected.endswith("yarn_only_types, swiglu_limits, swiglu_limits_shared")
    assert unknown.found == "rope_base"
    assert str(refused).endswith("found hidden_size; tensors have other shapes")
    assert {row.name for row in COMPARED} <= set(Step35Config.model_fields)


@pytest.mark.parametrize("document", [None, "{", "[1]", '{"hidden_size": 3}', ["a"], "[" * 10**5])
def test_checkpoint_without_a_readable_config_has_its_sum_only(document):
    args = argparse.Namespace(step35_fingerprint="01" * 32, step35_config_document=document)
    [line] = compare(args, config_of(), (), HERE).problems
    assert line.startswith(f"config fingerprint: {'01' * 32} in the checkpoint, ")
    assert "carries no config that would tell which fields differ: give the config that" in line
    args.step35_fingerprint = config_of().fingerprint
    assert compare(args, config_of(), (), HERE).problems == ()


def test_the_config_counts_more_than_a_sum_that_another_version_made():
    args = checkpoint(config_of())
    args.step35_fingerprint = "0" * 64
    assert compare(args, config_of(), (), HERE).problems == ()
