"""Generating with Megatron-Core's static context: by hand, and with its engine.

`assert_chosen_by` holds what was generated to the reference, which has no cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)

from support.figures import record
from support.parity import LOGITS, relative
from support.reference import Reference


def inferring() -> contextlib.AbstractContextManager:
    """Tells Megatron-Core that the model is used by an engine; 0.17 goes by the context alone."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


def static_context(batch: int, length: int) -> StaticInferenceContext:
    """For sequences of at most `length` tokens; all of them get logits."""
    context = StaticInferenceContext(batch, length)
    context.config.materialize_only_last_token_logits = False
    return context


@torch.inference_mode()
def next_logits(
    model: torch.nn.Module, context: StaticInferenceContext, tokens: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Logits [b, s, vocabulary] of each sequence's next tokens [b, s], which the cache takes in."""
    first = context.sequence_len_offset
    positions = torch.arange(first, first + tokens.shape[1]).expand_as(tokens)
    options = {"attention_mask": None, "runtime_gather_output": True} | options
    logits = model(tokens, positions, inference_context=context, **options)
    context.increment_sequence_len_offset(tokens.shape[1])
    return logits


def greedy(
    model: torch.nn.Module,
    context: StaticInferenceContext,
    prompt: torch.Tensor,
    new: int,
    pieces: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and chosen tokens [b, s + new], and the logits [b, s + new - 1, vocabulary].

    Args:
        model: a GPTModel in evaluation mode.
        context: an empty one.
        prompt: [b, s].
        new: number of tokens to choose.
        pieces: lengths of the prompt's parts that go in one after the other; all at once if empty.
    """
    parts = prompt.split(list(pieces) or prompt.shape[1], dim=1)
    logits = [next_logits(model, context, part) for part in parts]
    tokens = [prompt, logits[-1][:, -1:].argmax(-1)]
    context.enable_decode_mode()
    for _ in range(new - 1):
        logits.append(next_logits(model, context, tokens[-1]))
        tokens.append(logits[-1].argmax(-1))
    return torch.cat(tokens, 1), torch.cat(logits, 1)


@torch.no_grad()
def assert_chosen_by(
    reference: Reference, tokens: torch.Tensor, new: int, logits: torch.Tensor | None = None
) -> None:
    """Each new token is the reference's choice after all tokens before it, without a cache.

    Args:
        reference: transformers' model.
        tokens: [b, s + new].
        new: how many were generated.
        logits: ours, [b, s + new - 1, at least the vocabulary].
    """
    expected = reference.logits(reference.hidden_states(tokens[:, :-1]))
    if logits is not None:
        off = relative(logits[..., : expected.shape[-1]], expected)
        assert record("logits", off) < LOGITS
    assert torch.equal(tokens[:, -new:], expected[:, -new:].argmax(-1))
    record("tokens chosen alike", tokens.shape[0] * new)


class Numbers:
    """A tokenizer of texts like "5 17 3"."""

    eod, bos = -1, -2

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))

    def offsets(self, tokens: Sequence[int], text: str) -> list[int]:
        return [0] * len(tokens)


def by_the_engine(
    model: torch.nn.Module, prompts: Sequence[torch.Tensor], new: int, **options: Any
) -> tuple[list[torch.Tensor], StaticInferenceContext]:
    """What Megatron-Core's static engine makes of prompts [s] of any lengths, and its context.

    Args:
        model: a GPTModel, whole or a pipeline stage.
        prompts: [s] each.
        new: number of tokens to generate.
        options: of StaticInferenceEngine.

    Returns:
        [s + new] for each prompt; and the context.
    """
    tokenizer = Numbers()
    context = StaticInferenceContext(len(prompts), max(map(len, prompts)) + new)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
    sampling = SamplingParams(num_tokens_to_generate=new, top_k=1, termination_id=tokenizer.eod)
    with inferring():  # the engine never says that it is done
        engine = StaticInferenceEngine(controller, **options)
        requests = engine.generate(
            prompts=[tokenizer.detokenize(prompt.tolist()) for prompt in prompts],
            sampling_params=sampling,
        )
    return [
        torch.cat([prompt, request.generated_tokens])
        for prompt, request in zip(prompts, requests, strict=True)
    ], context
