"""Bytes that a rank sends in a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.costs.estimate import weights_of_rank
from step35_patch.costs.launch import Launch, stages
from step35_patch.costs.messages import Sent, sent_by_rank
from step35_patch.costs.weights import Parameters

TOKENS, HIDDEN, BATCH = 1024, 4096, 16
STATES = TOKENS * HIDDEN * 2  # of a micro-batch, in bf16


@pytest.fixture(scope="module")
def published() -> Step35Config:
    return Step35Config.from_pretrained(packaged_config_path())


def launch(**changes) -> Launch:
    return Launch(
        **{
            "num_layers": 45,
            "padded_vocab_size": 128896,
            "seq_length": TOKENS,
            "global_batch_size": BATCH,
        }
        | changes
    )


def sent(config: Step35Config, asked: Launch, pp: int = 0) -> Sent:
    return sent_by_rank(config, asked, stages(asked), pp)


def test_one_gpu_sends_nothing(published):
    assert sent(published, launch()) == Sent()


def test_gradients_are_summed_and_weights_gathered(published):
    four = launch(world_size=4, expert_model_parallel_size=2)
    own = Parameters.of(weights_of_rank(published, four, stages(four), 0))
    # An all-reduce of 4 bytes a weight, over 4 ranks, and of experts over 2.
    assert sent(published, four).data == 8 * (own.dense * 3 / 4 + own.expert / 2)
    shared = replace(four, use_distributed_optimizer=True)
    assert sent(published, shared).data == 6 * (own.dense * 3 / 4 + own.expert / 2)


def test_stages_send_states_and_gradients(published):
    three = launch(
        world_size=3,
        mtp_num_layers=2,
        pipeline_model_parallel_size=3,
        pipeline_model_parallel_layout="Et*20|t*25mm|L",
    )
    first, middle, last = (sent(published, three, pp) for pp in range(3))
    assert first.pipeline == BATCH * STATES
    # The states of both MTP layers go along to the last stage, and their gradients come back.
    assert middle.pipeline == BATCH * STATES * (1 + 3)
    assert last.pipeline == BATCH * STATES * 3
    # The copy of the embedding is on the middle stage.
    assert first.embedding == middle.embedding == 128896 * HIDDEN * 4
    assert last.embedding == 0
    virtual = replace(
        three,
        mtp_num_layers=0,
        global_batch_size=15,
        virtual_pipeline_model_parallel_size=5,
        pipeline_model_parallel_layout="Ettt|(ttt|)*13tttL",
    )
    # Fourteen borders between stages, both ways.
    assert sum(sent(published, virtual, pp).pipeline for pp in range(3)) == 15 * STATES * 2 * 14


def test_experts_get_their_tokens_and_send_them_back(published):
    eight = launch(world_size=8, expert_model_parallel_size=8, global_batch_size=8)
    once = 42 * 8 * STATES * 7 / 8
    assert sent(published, eight).expert == 4 * once
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    assert sent(published, replace(eight, **full)).expert == 6 * once


def test_tensor_parallel_ranks_gather_and_scatter(published):
    two = launch(world_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    # Five for attention and MLP each; the output three, the embedding two.
    assert sent(published, two).tensor == BATCH * STATES / 2 * (45 * 2 * 5 + 3 + 2)


def test_context_parallel_ranks_pass_keys_or_heads(published):
    four = launch(world_size=4, context_parallel_size=4)
    tokens, head = TOKENS // 4, 128 * 2
    full = 12 * 3 * 2 * 8 * head * tokens * 3  # keys and values go round, three times
    sliding = 33 * 3 / 4 * (2 * 96 + 2 * 8) * head * tokens * 2
    assert sent(published, four).context == pytest.approx(BATCH * (full + sliding))
    # Eight groups don't go into sixteen ranks: keys and values are gathered.
    many = launch(world_size=16, context_parallel_size=16)
    gathered = 45 * 15 * 2 * 8 * head * (TOKENS // 16) * 3
    assert sent(published, many).context == pytest.approx(BATCH * gathered)
