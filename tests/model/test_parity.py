"""Logits, losses and gradients equal those of transformers' Step3p7, in fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.ours import build, run
from support.parity import FEATURES, LOGITS, compare, relative
from support.reference import (
    FULL,
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]


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
        None if kind == FULL else (WINDOW - 1, 0) for kind in tiny_config()["layer_types"]
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
