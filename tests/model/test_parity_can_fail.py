"""Each numeric choice, made wrongly, is seen by the parity test.

A mutation is either another config for our side only (the weights and the reference stay) or a
patch of the one place where the package makes that choice.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.implementation import ON_TRANSFORMER_ENGINE
from support.ours import build
from support.parity import compare
from support.reference import (
    FULL,
    SLIDING,
    WINDOW,
    Reference,
    random_weights,
    tiny_config,
    write_hf_folder,
)

import step35_patch.model.attention
import step35_patch.model.mtp
import step35_patch.tensors.qkv
from step35_patch import Step35Config
from step35_patch.checkpoint import load_hf_weights
from step35_patch.model.norm import Step35RMSNorm
from step35_patch.model.swiglu import ClampedSwiGLU, RoutedSwiGLU

pytestmark = pytest.mark.transformer_engine

_scaling = tiny_config()["rope_scaling"]
_rope_theta = tiny_config()["rope_theta"]

# What our side reads instead of the true config.
WRONG_CONFIGS = {
    "window one key wider": {"sliding_window": WINDOW + 1},
    "window one key narrower": {"sliding_window": WINDOW - 1},
    "scaling on all layers": {"yarn_only_types": [FULL, SLIDING]},
    "scaling on no layer": {"rope_scaling": None},
    "Megatron-Core's fixed llama3 constants": {
        "rope_scaling": _scaling | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "one RoPE base for all layers": {"rope_theta": 50.0},
    "one rotated share for all layers": {"partial_rotary_factors": [0.5] * 8},
    "no routed clamp": {"swiglu_limits": None},
    "no shared clamp": {"swiglu_limits_shared": None},
    "another routing scale": {"moe_router_scaling_factor": 1.0},
    "another epsilon": {"rms_norm_eps": 1e-2},
    "fewer experts a token": {"moe_top_k": 3},
}


def _clamp_before_silu(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    if self.limit is not None:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return torch.nn.functional.silu(gate) * up


def _clamp_gate_below_too(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = torch.nn.functional.silu(gate)
    if self.limit is not None:
        gate, up = gate.clamp(-0.05, self.limit), up.clamp(-self.limit, self.limit)
    return gate * up


def _uncentred_norm(self, x):
    return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _routed_clamp_before_silu(gate_up, limit, weights):
    return _clamp_before_silu(ClampedSwiGLU(limit), gate_up) * weights


# Where routed experts are clamped: on torch, in the function that is all of them.
ROUTED_CLAMP = (
    (RoutedSwiGLU, "forward", _clamp_before_silu)
    if ON_TRANSFORMER_ENGINE
    else ("step35_patch.model.experts", "weighted_swiglu", _routed_clamp_before_silu)
)
# Where the norm is computed: in Transformer Engine's kernel, which is told that it is centred.
UNCENTRED_NORM = (
    ("support.te_on_cpu.norms", "_gamma", lambda weight, zero_centered: weight.float())
    if ON_TRANSFORMER_ENGINE
    else (Step35RMSNorm, "forward", _uncentred_norm)
)


def _gate_without_sigmoid(self, x, gate):
    return (x.view(*gate.shape, -1) * gate.unsqueeze(-1)).view(x.shape)


def _gate_of_the_next_head(self, x, gate):
    return (x.view(*gate.shape, -1) * gate.roll(1, -1).sigmoid().unsqueeze(-1)).view(x.shape)


_gate = step35_patch.model.attention.Step35SelfAttention._apply_output_gate
_pack_qkv = step35_patch.tensors.qkv.pack_qkv


def _gate_after_the_keys(q, k, v, g, plan, layout):
    # As a converter would that puts the gate rows behind q, k and v of the whole layer.
    return _pack_qkv(q, k, v, g.roll(1, 0), plan, layout)


def _gate_of_the_next_head_in_one_layer(self, x, gate):
    return (_gate_of_the_next_head if self.layer_number == 4 else _gate)(self, x, gate)


def _change_plans(*layers, **changes):
    """Change the plans of some layers, of all if none are named."""
    resolve = Step35Config.resolve

    def resolve_wrongly(self, window):
        return tuple(
            dataclasses.replace(plan, **{name: get(plan) for name, get in changes.items()})
            if not layers or plan.index in layers
            else plan
            for plan in resolve(self, window)
        )

    return Step35Config, "resolve", resolve_wrongly


_output_layer_of_the_model = staticmethod(lambda output_layer: output_layer)

# Where our side computes something else: (object, attribute, what is put there).
WRONG_CODE = {
    "clamp before silu": (ClampedSwiGLU, "forward", _clamp_before_silu),
    "clamp before silu in routed experts": ROUTED_CLAMP,
    "gate clamped from below": (ClampedSwiGLU, "forward", _clamp_gate_below_too),
    "uncentred norm": UNCENTRED_NORM,
    "gate without sigmoid": (
        step35_patch.model.attention.Step35SelfAttention,
        "_apply_output_gate",
        _gate_without_sigmoid,
    ),
    "gate of another head": (
        step35_patch.model.attention.Step35SelfAttention,
        "_apply_output_gate",
        _gate_of_the_next_head,
    ),
    "gate of another head in one layer": (
        step35_patch.model.attention.Step35SelfAttention,
        "_apply_output_gate",
        _gate_of_the_next_head_in_one_layer,
    ),
    "no window in one layer": _change_plans(3, window_size=lambda p: None),
    "another RoPE base in one layer": _change_plans(3, rotary_base=lambda p: 50.0),
    "no clamp in one layer's experts": _change_plans(3, swiglu_limit=lambda p: None),
    "no clamp in one layer's shared expert": _change_plans(3, swiglu_limit_shared=lambda p: None),
    "gate rows of another head": (
        "step35_patch.model.live_weights",
        "pack_qkv",
        _gate_after_the_keys,
    ),
    "dense limit from the routed list": _change_plans(
        swiglu_limit_shared=lambda p: p.swiglu_limit_shared if p.is_moe else p.swiglu_limit
    ),
    "routed limit from the shared list": _change_plans(
        swiglu_limit=lambda p: p.swiglu_limit_shared
    ),
    "MTP layers with full attention": _change_plans(
        window_size=lambda p: None if p.is_mtp else p.window_size
    ),
    "MTP layers with the full layers' RoPE": _change_plans(
        rotary_base=lambda p: 50.0 if p.is_mtp else p.rotary_base
    ),
    "the model's output matrix for the MTP layers": (
        "step35_patch.model.mtp",
        "by_depth",
        _output_layer_of_the_model.__func__,
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tiny_config()
    weights = random_weights(config, 11)
    return config, weights, write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights)


def _assert_parity_fails(model, config, weights):
    with pytest.raises(AssertionError, match=r"logits|loss|model.layers"):
        compare(model, Reference(config, weights), seed=11, length=4 * WINDOW)


def test_the_unchanged_model_passes(case):
    config, weights, folder = case
    compare(build(folder), Reference(config, weights), seed=11, length=4 * WINDOW)


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_config_is_seen(case, tmp_path, name):
    config, weights, _ = case
    wrong = write_hf_folder(tmp_path / "wrong", config | WRONG_CONFIGS[name], weights)
    _assert_parity_fails(build(wrong), config, weights)


@pytest.mark.parametrize("name", WRONG_CODE)
def test_wrong_code_is_seen(case, monkeypatch, name):
    config, weights, folder = case
    owner, attribute, wrong = WRONG_CODE[name]
    if isinstance(owner, str):
        monkeypatch.setattr(f"{owner}.{attribute}", wrong)
    else:
        monkeypatch.setattr(owner, attribute, wrong)
    _assert_parity_fails(build(folder), config, weights)


def test_weights_that_were_not_loaded_are_seen(case):
    config, weights, folder = case
    model = build(folder)
    with torch.no_grad():
        model.decoder.layers[3].self_attention.k_layernorm.weight.zero_()
    _assert_parity_fails(model, config, weights)
    load_hf_weights(model, folder)
    compare(model, Reference(config, weights), seed=11, length=4 * WINDOW)
