"""Generation with Megatron-Core's static inference context, against transformers without a cache."""

import pytest
import torch
from support.generation import greedy, inferring, next_logits, static_context
from support.ours import build
from support.parity import FEATURES, LOGITS, relative
from support.reference import (
    SLIDING,
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

PROMPT, NEW = WINDOW + 3, 64


def both(folder, seed=0, changes=None, **overrides):
    """Our model in evaluation mode, and transformers', with the same weights."""
    config = tiny_config(**(changes or {}))
    weights = random_weights(config, seed)
    model = build(write_hf_folder(folder, config, weights), **overrides)
    return model.eval(), Reference(config, weights)


def assert_as_transformers(reference, tokens, logits):
    """That each token is what transformers chooses after those before it.

    tokens: [b, s], the last NEW of them generated; logits: [b, s - 1, vocabulary], ours.
    """
    with torch.no_grad():
        expected = reference.logits(reference.hidden_states(tokens[:, :-1]))
    assert relative(logits[..., : expected.shape[-1]], expected) < LOGITS
    assert torch.equal(tokens[:, -NEW:], expected[:, -NEW:].argmax(-1))


@pytest.mark.parametrize("pieces", [(), (4, 1, 6)])
def test_g(tmp_path, pieces):
    model, reference = both(tmp_path)
    prompt, _ = random_tokens(0, 2, PROMPT)
    context = static_context(2, PROMPT + NEW)
    with inferring():
        tokens, logits = greedy(model, prompt, NEW, context, pieces)
    assert_as_transformers(reference, tokens, logits)
