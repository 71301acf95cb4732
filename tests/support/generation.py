"""Generating greedily with Megatron-Core's static context, one forward pass after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext


def inferring() -> contextlib.AbstractContextManager:
    """What tells Megatron-Core that an engine uses the model; 0.17 goes by the context alone."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


def static_context(batch: int, length: int) -> StaticInferenceContext:
    """For sequences of at most `length` tokens, with the logits of every token."""
    context = StaticInferenceContext(batch, length)
    context.config.materialize_only_last_token_logits = False
    return context


@torch.inference_mode()
def next_logits(
    model: torch.nn.Module, context: StaticInferenceContext, tokens: torch.Tensor
) -> torch.Tensor:
    """Logits [b, s, vocabulary] of the next tokens [b, s], which go into the cache."""
    first = context.sequence_len_offset
    positions = torch.arange(first, first + tokens.shape[1]).expand_as(tokens)
    logits = model(
        tokens, positions, None, inference_context=context, runtime_gather_output=True
    )
    context.increment_sequence_len_offset(tokens.shape[1])
    return logits


def greedy(
    model: torch.nn.Module,
    prompt: torch.Tensor,
    new: int,
    context: StaticInferenceContext,
    pieces: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and greedily chosen tokens [b, s + new], and the logits of all but the last.

    Args:
        model: a GPTModel in evaluation mode.
        prompt: [b, s].
        new: tokens to choose.
        context: empty.
        pieces: lengths in which the prompt goes in; it goes in as a whole by default.
    """
    logits = [next_logits(model, context, piece) for piece in prompt.split(pieces or len(prompt[0]), 1)]
    tokens = [prompt]
    for _ in range(new):
        tokens.append(logits[-1][:, -1:].argmax(-1))
        if len(tokens) <= new:
            context.enable_decode_mode()
            logits.append(next_logits(model, context, tokens[-1]))
    return torch.cat(tokens, 1), torch.cat(logits, 1)
