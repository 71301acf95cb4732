"""A padded vocabulary changes neither losses, logits nor gradients, unless it is asked to."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.ours import build, run
from support.padded_vocabulary import build_padded, matrices, padded_rows
from support.parity import LOSS, compare, relative
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

from step35_patch.model.padded_vocabulary import masked_logit
from step35_patch.patch import built_model

pytestmark = pytest.mark.megatron

COLUMNS, PADDED = 96, 96 + 45
LENGTH = 3 * WINDOW + 1


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tiny_config()
    weights = random_weights(config, 41)
    return write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights), config, weights


@pytest.mark.parametrize("parallel_output", [True, False])
def test_padded_model_is_the_reference_s(case, parallel_output):
    folder, config, weights = case
    model = build_padded(folder, PADDED, parallel_output=parallel_output)
    compare(model, Reference(config, weights), seed=41, length=LENGTH)
    for matrix in matrices(model):
        assert not padded_rows(model, matrix.weight.grad).any()
        assert matrix.weight.grad.any()
    with torch.inference_mode():
        logits = run(model.eval(), random_tokens(41, 2, LENGTH)[0])
    assert logits.shape[-1] == PADDED
    assert (logits[..., COLUMNS:] == masked_logit(logits.dtype)).all()


def test_mtp_losses_that_are_reported_are_the_reference_s(case):
    folder, config, weights = case
    tokens = random_tokens(42, 2, LENGTH)
    _, _, expected = Reference(config, weights).losses(*tokens)
    masked, kept = (
        reported_mtp_losses(build_padded(folder, PADDED, padded_logits=padded_logits), tokens)
        for padded_logits in ("masked", "kept")
    )
    expected = torch.stack(expected)
    assert relative(masked, expected) < LOSS
    assert (kept > expected + 0.05).all()


def reported_mtp_losses(model, tokens):
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    run(model.train(), *tokens)
    tracker = MTPLossLoggingHelper.tracker
    # "values" before Megatron-Core 0.19.
    return (tracker["loss_values"] if "loss_values" in tracker else tracker["values"]).clone()


def test_kept_is_megatron_s_way(case):
    folder, config, weights = case
    model = build_padded(folder, PADDED, padded_logits="kept")
    input_ids, labels = random_tokens(43, 2, LENGTH)
    logits, losses = run(model, input_ids), run(model, input_ids, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(losses.mean().item() / expected.item() - 1) < LOSS
    _, without_padding, _ = Reference(config, weights).losses(input_ids, labels)
    assert losses.mean() > without_padding + 0.05
    losses.mean().backward()
    assert padded_rows(model, model.output_layer.weight.grad).any()


@pytest.mark.parametrize(
    ("size", "padded_logits", "end"),
    [
        (PADDED, "masked", "2 MTP, router bias fixed, 45 padded columns masked"),
        (PADDED, "kept", "2 MTP, router bias fixed, 45 padded columns kept"),
        (COLUMNS, "masked", "2 MTP, router bias fixed"),
    ],
)
def test_the_start_line_tells_of_padding(case, capsys, size, padded_logits, end):
    built_model._print_once.cache_clear()
    build_padded(case[0], size, padded_logits=padded_logits)
    lines = [line for line in capsys.readouterr().out.splitlines() if "step35_patch" in line]
    assert lines[0].endswith(end)
    assert ["padded_logits='kept'" in line for line in lines[1:]] == [True] * (len(lines) - 1)
    assert len(lines) == (2 if padded_logits == "kept" else 1)


def test_nothing_is_hooked_without_padding(case):
    model = build(case[0])
    assert [len(matrix._forward_hooks) for matrix in matrices(model)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_logit_stays_finite_in_what_is_done_to_logits(dtype):
    logits = 40 + 8 * torch.randn(64, 24)
    logits[:, 16:] = masked_logit(dtype)
    # Divided by a temperature, and log-softmax in the logits' own dtype.
    log_p = (logits.to(dtype) / 0.5).log_softmax(-1)
    assert log_p.isfinite().all()
    assert not log_p[:, 16:].exp().any()
    alone = logits[:, 16:].to(dtype)
    assert (alone - alone.amax(-1, keepdim=True)).exp().isfinite().all()


@pytest.mark.slow
def test_padding_across_tensor_parallel_ranks(case, ranks, tmp_path):
    folder, config, weights = case
    input_ids, labels = random_tokens(44, 2, LENGTH - 1)
    logits, loss, _ = Reference(config, weights).losses(input_ids, labels)
    expected = {"logits": logits.detach(), "loss": loss.detach()}
    torch.save(expected | {"input_ids": input_ids, "labels": labels}, tmp_path / "expected.pt")
    code = "from support import padded_vocabulary; padded_vocabulary.main(*arguments)"
    ended = ranks.run(code, 2, folder, tmp_path / "expected.pt")
    assert ended.statuses == [0, 0], ended.text[-8000:]
    # By no lines: two ranks may write into one.
    assert sorted(re.findall(r"rank \d ok", ended.text)) == ["rank 0 ok", "rank 1 ok"]
