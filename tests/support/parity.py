"""What parity means: the features, the tolerances, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from support.figures import record
from support.ours import published_gradients, run
from support.reference import (
    FULL,
    PAD_TOKEN,
    SLIDING,
    Reference,
    random_tokens,
    tiny_config,
)

LOGITS, LOSS, GRADIENT = 2e-5, 1e-5, 1e-3

_types = tiny_config()["layer_types"]
_LAYERS = tiny_config()["num_hidden_layers"]


def _heads(full: int, sliding: int, groups: int, head_dim: int = 16) -> dict:
    other = {"num_attention_heads": sliding, "num_attention_groups": groups, "head_dim": head_dim}
    return {
        "num_attention_heads": full,
        "num_attention_groups": groups,
        "head_dim": head_dim,
        "attention_other_setting": other | {"attention_type": SLIDING},
    }


# Case: what it changes in tiny_config, which has every feature. `...` removes a field.
FEATURES = {
    "everything": {},
    "no gate": {"use_head_wise_attn_gate": False},
    "no window": {
        "layer_types": [FULL] * 8,
        "rope_theta": 50.0,
        "partial_rotary_factors": [0.5] * 8,
    },
    "no full layer": {
        "layer_types": [SLIDING] * 8,
        "rope_theta": 10.0,
        "partial_rotary_factors": [1.0] * 8,
        "rope_scaling": ...,
    },
    "no rope scaling": {"rope_scaling": None},
    "no partial rotation": {"partial_rotary_factors": ...},
    "no clamps": {"swiglu_limits": None, "swiglu_limits_shared": ...},
    "routed clamps only": {"swiglu_limits_shared": None},
    "shared clamps only": {"swiglu_limits": None},
    "no MoE": {"use_moe": False, "moe_layers_enum": ""},
    "MoE everywhere": {"moe_layers_enum": list(range(_LAYERS))},
    "no MTP": {
        "num_nextn_predict_layers": 0,
        "layer_types": _types[:_LAYERS],
        "rope_theta": tiny_config()["rope_theta"][:_LAYERS],
        "partial_rotary_factors": tiny_config()["partial_rotary_factors"][:_LAYERS],
        "swiglu_limits": tiny_config()["swiglu_limits"][:_LAYERS],
        "swiglu_limits_shared": tiny_config()["swiglu_limits_shared"][:_LAYERS],
    },
    "three MTP layers": {
        "num_nextn_predict_layers": 3,
        "layer_types": [*_types, SLIDING],
        "rope_theta": tiny_config()["rope_theta"] + [10.0],
        "partial_rotary_factors": tiny_config()["partial_rotary_factors"] + [1.0],
        "swiglu_limits": tiny_config()["swiglu_limits"] + [0.0],
        "swiglu_limits_shared": tiny_config()["swiglu_limits_shared"] + [0.0],
    },
    "scalar rope base": {"rope_theta": 30.0},
    "lists without the MTP layers": {
        "layer_types": _types[:_LAYERS],
        "rope_theta": tiny_config()["rope_theta"][:_LAYERS],
        "partial_rotary_factors": tiny_config()["partial_rotary_factors"][:_LAYERS],
        "swiglu_limits": tiny_config()["swiglu_limits"][:_LAYERS],
        "swiglu_limits_shared": tiny_config()["swiglu_limits_shared"][:_LAYERS],
    },
    "one group": _heads(full=4, sliding=6, groups=1),
    "a group for each head": _heads(full=4, sliding=4, groups=4),
    "fewer sliding heads": _heads(full=8, sliding=4, groups=4, head_dim=8),
    "three experts a token": {"moe_top_k": 3},
    "window of one": {"sliding_window": 1},
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(
    model,
    reference: Reference,
    seed: int,
    length: int,
    batch: int = 2,
    vocabulary: int = PAD_TOKEN,
) -> None:
    """Assert that logits, loss and all gradients agree, the MTP layers' included.

    Columns of the logits that pad the vocabulary are not looked at.
    """
    input_ids, labels = random_tokens(seed, batch, length, vocabulary)
    logits, loss, mtp_losses = reference.losses(input_ids, labels)
    model.train()
    found = run(model, input_ids)[..., : logits.shape[-1]]
    logits_off = relative(found, logits)
    assert logits_off < LOGITS, "logits"
    losses = run(model, input_ids, labels)
    loss_off = abs(losses.mean().item() / loss.item() - 1)
    assert loss_off < LOSS, "loss"

    losses.mean().backward()
    total_loss(model, loss, mtp_losses).backward()
    compare_gradients(model, reference)
    record("logits", logits_off)
    record("loss", loss_off)


def total_loss(model, loss: torch.Tensor, mtp_losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a model trains on, of the reference's losses."""
    if not mtp_losses:
        return loss
    return loss + model.config.mtp_loss_scaling_factor / model.config.mtp_num_layers * sum(
        mtp_losses
    )


def compare_gradients(model, reference: Reference) -> None:
    """Assert that all gradients agree, in the published names."""
    found, expected = published_gradients(model), reference.gradients()
    assert set(found) == set(expected)
    # Where the reference's gradient is zero (q and k of a one-key window), ours is rounding.
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    off = {
        name: relative(found[name], expected[name])
        for name in expected
        if expected[name].any() or found[name].abs().max() > floor
    }
    assert max(off.values()) < GRADIENT, sorted(off.items(), key=lambda item: -item[1])[:5]
    record("gradient", max(off.values()))
