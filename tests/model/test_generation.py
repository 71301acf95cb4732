"""Generation with Megatron-Core's static context chooses what transformers does without a cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.generation import (
    assert_chosen_by,
    by_the_engine,
    greedy,
    inferring,
    next_logits,
    static_context,
)
from support.ours import build, run
from support.parity import FEATURES, LOGITS, relative
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

PROMPT = WINDOW + 3
NEW = 64  # so that all of them are past the window
LENGTH = PROMPT + NEW

# Of `parity.FEATURES`, with a seed: those that change what is cached, or how it is read.
CASES = [
    ("everything", 0),
    ("everything", 1),
    ("no gate", 2),
    ("no MTP", 3),
    ("no window", 4),
    ("no full layer", 5),
    ("window of one", 6),
    ("one group", 7),
]


@pytest.fixture
def both(tmp_path):
    """Makes our model, in evaluation mode, and transformers', with the same weights."""

    def make(seed=0, changes=None, **options):
        config = tiny_config(**(changes or {}))
        weights = random_weights(config, seed)
        folder = write_hf_folder(tmp_path / "hf", config, weights)
        return build(folder, **options).eval(), Reference(config, weights)

    return make


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_greedy_tokens_are_those_of_transformers(both, name, seed):
    model, reference = both(seed, FEATURES[name])
    prompt, _ = random_tokens(seed, 2, PROMPT)
    with inferring():
        tokens, logits = greedy(model, static_context(2, LENGTH), prompt, NEW)
    assert_chosen_by(reference, tokens, NEW, logits)


@pytest.mark.parametrize("options", [{"gate_layout": "expanded"}, {"window": "steptron"}])
def test_the_runs_own_choices(both, options):
    model, reference = both(2, **options)
    if "window" in options:
        reference = Reference(
            tiny_config(sliding_window=WINDOW + 1), random_weights(tiny_config(), 2)
        )
    prompt, _ = random_tokens(2, 2, PROMPT)
    with inferring():
        tokens, logits = greedy(model, static_context(2, LENGTH), prompt, NEW)
    assert_chosen_by(reference, tokens, NEW, logits)


@pytest.mark.transformer_engine(only=True)
def test_rope_by_transformer_engines_kernel(both):
    model, reference = both(2, apply_rope_fusion=True)
    prompt, _ = random_tokens(2, 2, PROMPT)
    with inferring():
        tokens, logits = greedy(model, static_context(2, LENGTH), prompt, NEW)
    assert_chosen_by(reference, tokens, NEW, logits)


@pytest.mark.parametrize("pieces", [(4, 1, 6), (1,) * PROMPT])
def test_prompt_in_pieces(both, pieces):
    """Each piece is attended to by its own tokens, causally, and those of the pieces before."""
    model, reference = both(3)
    prompt, _ = random_tokens(3, 2, PROMPT)
    with inferring():
        tokens, logits = greedy(model, static_context(2, LENGTH), prompt, 8, pieces)
    assert_chosen_by(reference, tokens, 8, logits)


def test_rows_of_a_larger_context(both):
    """Micro-batches: the second one's rows stand behind the first one's."""
    model, _ = both(4)
    tokens, _ = random_tokens(4, 3, 2 * WINDOW)
    context = static_context(4, 2 * WINDOW)
    found = []
    with inferring():
        for part in tokens.split([11, 1, 4], dim=1):
            context.reset_batch_size_offset()
            first = context.sequence_len_offset
            for rows in part.split([1, 2]):
                context.sequence_len_offset = first
                found.append((first, next_logits(model, context, rows)))
                context.increment_batch_size_offset(rows.shape[0])
    whole = torch.cat([torch.cat([x for _, x in found[i : i + 2]]) for i in range(0, 6, 2)], 1)
    assert relative(whole, run(model, tokens)) < LOGITS


@pytest.mark.parametrize(("name", "groups"), [("everything", 2), ("one group", 1)])
def test_the_cache_has_the_key_heads(both, name, groups):
    """Not the query heads, which differ by layer."""
    model, _ = both(0, FEATURES[name])
    context = static_context(4, LENGTH)
    with inferring():
        next_logits(model, context, random_tokens(0, 2, PROMPT)[0])
    found = {n: {tuple(x.shape) for x in kv} for n, kv in context.key_value_memory_dict.items()}
    assert found == {n: {(LENGTH, 4, groups, 16)} for n in range(1, 7)}


def test_keys_that_are_out_of_the_window_are_not_read(both):
    model, _ = both(5)
    tokens, _ = random_tokens(5, 2, 5 * WINDOW)
    expected = run(model, tokens)[:, -1:]
    context = static_context(2, 5 * WINDOW)
    handed = []
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda module, args: handed.append(args[1].shape[0])
        )
    with inferring():
        next_logits(model, context, tokens[:, :-1])
        for number, kv in context.key_value_memory_dict.items():
            if model.decoder.layers[number - 1].plan.window_size is not None:
                with torch.inference_mode():
                    for cached in kv:
                        cached[:-WINDOW] = float("nan")
        handed.clear()
        last = next_logits(model, context, tokens[:, -1:])
    assert relative(last, expected) < LOGITS
    assert handed == [5 * WINDOW, *[WINDOW] * 3, 5 * WINDOW, WINDOW]


def test_mtp_layers_run_outside_of_the_engines_mode_too(both):
    """Megatron-Core then runs the MTP layers, without a cache; their logits go nowhere."""
    model, reference = both(6)
    prompt, _ = random_tokens(6, 2, PROMPT)
    tokens, logits = greedy(model, static_context(2, LENGTH), prompt, 4)
    assert_chosen_by(reference, tokens, 4, logits)


def test_training_goes_on_after_generating(both):
    model, _ = both(7)
    prompt, labels = random_tokens(7, 2, PROMPT)
    with inferring():
        greedy(model, static_context(2, PROMPT), prompt[:, :-1], 1)
    run(model.train(), prompt, labels).mean().backward()
    assert all(p.grad is not None for p in model.decoder.layers[0].self_attention.parameters())


@pytest.mark.parametrize("options", [{"legacy": True}, {}], ids=["static", "by default"])
def test_megatrons_engine_and_controller(both, options):
    """Prompts of different lengths. By default the engine tries the dynamic context first."""
    model, reference = both(8)
    prompts, _ = random_tokens(8, 2, 20)
    sequences, _ = by_the_engine(model, [prompts[0, :PROMPT], prompts[1]], NEW, **options)
    for tokens in sequences:
        assert_chosen_by(reference, tokens[None], NEW)


def test_longer_than_the_context(both):
    model, _ = both()
    context = static_context(1, PROMPT)
    prompt, _ = random_tokens(0, 1, PROMPT)
    with inferring():
        next_logits(model, context, prompt)
        with pytest.raises(ValueError, match=rf"expected at least {PROMPT + 1}.*found {PROMPT}"):
            next_logits(model, context, prompt[:, :1])


def test_what_layers_cannot_generate_with(both):
    model, _ = both()
    attention, hidden = model.decoder.layers[0].self_attention, torch.zeros(4, 1, 32)
    dynamic = SimpleNamespace(is_dynamic_batching=lambda: True)
    with pytest.raises(NotImplementedError, match="StaticInferenceContext"):
        attention(hidden, None, inference_context=dynamic)
    packed = SimpleNamespace(qkv_format="thd")
    with pytest.raises(NotImplementedError, match="packed_seq_params"):
        attention(hidden, None, inference_context=static_context(1, 4), packed_seq_params=packed)


def test_dynamic_context_is_refused_before_its_cache_is_made(both):
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext

    model, _ = both()
    with pytest.raises(NotImplementedError, match="StaticInferenceContext"):
        DynamicInferenceContext(model.config, InferenceConfig(max_sequence_length=64))
