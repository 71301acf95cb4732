"""Logits, losses and gradients equal those of transformers' Step3p7, in fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from ours import build, published_gradients, run
from reference import (
    FULL,
    SLIDING,
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = pytest.mark.megatron

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
        "layer_types": _types + [SLIDING],
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


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Makes the folder of a config and seed, once for each."""
    made = {}

    def make(config: dict, seed: int):
        key = (repr(config), seed)
        if key not in made:
            weights = random_weights(config, seed)
            folder = tmp_path_factory.mktemp("hf")
            made[key] = write_hf_folder(folder, config, weights), weights
        return made[key]

    return make


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(model, reference: Reference, seed: int, length: int, batch: int = 2) -> None:
    """Assert that logits, loss and all gradients agree, the MTP layers' included."""
    input_ids, labels = random_tokens(seed, batch, length)
    logits, loss, mtp_losses = reference.losses(input_ids, labels)
    model.train()
    assert relative(run(model, input_ids), logits) < LOGITS, "logits"
    losses = run(model, input_ids, labels)
    assert abs(losses.mean().item() / loss.item() - 1) < LOSS, "loss"

    losses.mean().backward()
    total = loss
    if mtp_losses:
        scale = model.config.mtp_loss_scaling_factor / model.config.mtp_num_layers
        total = loss + scale * sum(mtp_losses)
    total.backward()
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


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
@pytest.mark.parametrize("name", FEATURES)
def test_parity_of_each_feature(hf_folder, name, gate_layout):
    config = tiny_config(**FEATURES[name])
    folder, weights = hf_folder(config, seed=1)
    model = build(folder, gate_layout=gate_layout)
    compare(model, Reference(config, weights), seed=1, length=3 * WINDOW + 1)


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("length", [WINDOW - 3, WINDOW, WINDOW + 1, 12 * WINDOW + 5])
def test_parity_of_each_length(hf_folder, length, seed):
    """Below, at, one above and far above the window; the longest is past RoPE's length."""
    config = tiny_config()
    folder, weights = hf_folder(config, seed)
    compare(build(folder), Reference(config, weights), seed, length, batch=1)


def test_window_of_the_trainer_is_one_key_more(hf_folder):
    config = tiny_config()
    folder, weights = hf_folder(config, seed=5)
    model = build(folder, window="steptron")
    wider = tiny_config(sliding_window=WINDOW + 1)
    compare(model, Reference(wider, weights), seed=5, length=4 * WINDOW)


def test_bf16_stays_close_to_fp32(hf_folder):
    """The same weights in bf16; the reference stays in fp32. No routing: near ties flip."""
    config = tiny_config(use_moe=False, moe_layers_enum="", torch_dtype="bfloat16")
    weights = {n: t.to(torch.bfloat16) for n, t in random_weights(config, 6).items()}
    folder = write_hf_folder(hf_folder(tiny_config(), 6)[0].parent / "bf16", config, weights)
    model = build(folder, bf16=True, params_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    input_ids, labels = random_tokens(6, 2, 4 * WINDOW)
    logits, loss, _ = Reference(config, weights).losses(input_ids, labels)
    found = run(model, input_ids).float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), logits.flatten(), dim=0) > 0.999
    assert abs(run(model, input_ids, labels).float().mean().item() / loss.item() - 1) < 0.01


def test_attention_mask_of_the_dataloader_changes_nothing(hf_folder):
    """Megatron's loader makes a causal mask for the local path unless it is told not to."""
    folder, _ = hf_folder(tiny_config(), seed=7)
    model = build(folder)
    input_ids, _ = random_tokens(7, 2, 3 * WINDOW)
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    mask = torch.ones(1, 1, 3 * WINDOW, 3 * WINDOW).tril() < 0.5
    assert relative(model(input_ids, positions, mask), run(model, input_ids)) < LOGITS


def test_layers_do_not_share_or_change_the_configuration(hf_folder):
    folder, _ = hf_folder(tiny_config(), seed=1)
    model = build(folder)
    layers = list(model.decoder.layers) + [mtp.mtp_model_layer for mtp in model.mtp.layers]
    assert [layer.plan.index for layer in layers] == list(range(8))
    assert [layer.config.num_attention_heads for layer in layers] == [4, 6, 6, 6, 4, 6, 6, 6]
    assert [layer.config.window_size for layer in layers] == [
        None if kind == FULL else (WINDOW - 1, 0) for kind in _types
    ]
    assert len({id(layer.config) for layer in layers}) == len(layers)
    config = model.config
    assert (config.num_attention_heads, config.window_size) == (4, None)
    assert not config.attention_output_gate and not config.use_te_activation_func


def test_rope_is_computed_once_for_each_kind_of_layer(hf_folder, monkeypatch):
    from step35_patch.model import rope

    folder, _ = hf_folder(tiny_config(), seed=1)
    model = build(folder)
    rope._angles.cache_clear()
    calls = []
    frequencies = rope.inverse_frequencies
    monkeypatch.setattr(
        rope, "inverse_frequencies", lambda *args: calls.append(args) or frequencies(*args)
    )
    input_ids, labels = random_tokens(1, 1, 20)
    for _ in range(2):
        run(model, input_ids, labels)
    assert len(calls) == 2  # full and sliding; the MTP layers are sliding ones
