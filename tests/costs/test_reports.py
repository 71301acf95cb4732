"""Megatron's printed numbers, from its own arguments: against Megatron's count for a model that it
counts rightly, against what `step35-patch estimate` says, and by hand.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from support.built_ranks import LENGTH, parse
from support.reference import FULL, tiny_config

import step35_patch
from step35_patch import Step35Config, settings
from step35_patch.config import packaged_config_path
from step35_patch.costs import megatron_reports as reports
from step35_patch.costs.accounting import training_flops
from step35_patch.costs.estimate import estimate
from step35_patch.costs.launch import from_arguments
from step35_patch.model.description import from_settings

pytestmark = pytest.mark.megatron

FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.fixture
def arguments(tmp_path):
    def write_and_parse(config: dict | Path, words: str = "", world_size: int = 1):
        if isinstance(config, dict):
            (tmp_path / "config.json").write_text(json.dumps(config))
            config = tmp_path / "config.json"
        return parse(config, words, world_size)

    yield write_and_parse
    step35_patch.activate()


# --- Operations ---------------------------------------------------------------------------------


def plain_config(**changes) -> dict:
    """A model without what Megatron doesn't know: one kind of attention, and no gate."""
    plain = {
        "layer_types": [FULL] * 8,
        "rope_theta": 50.0,
        "partial_rotary_factors": None,
        "use_head_wise_attn_gate": False,
        "moe_layers_enum": "1,3",
    }
    return tiny_config(**(plain | changes))


def test_operations_are_megatrons_own_for_a_plain_model(arguments):
    """But for the routers, which Megatron leaves out, and the MTP norms, which it takes in."""
    from megatron.training import training

    args = arguments(plain_config())
    ours = training.num_floating_point_operations(args, 4)
    step35_patch.activate()  # inert
    stock = training.num_floating_point_operations(args, 4)
    routers, norms = 2 * 32 * 4, 2 * 3 * 32
    assert ours - stock == 6 * 4 * LENGTH * (routers - norms)


def test_operations_of_packed_sequences(arguments):
    """As those of a batch of sequences of that length without padding."""
    from megatron.training import training

    if (
        "seqlen_squared_sum_in_batch"
        not in inspect.signature(training.num_floating_point_operations).parameters
    ):
        pytest.skip("this Megatron-Core does not count packed sequences apart")
    args = arguments(tiny_config())
    sequences = 12  # of 16 tokens; the rest of the batch is padding
    packed = training.num_floating_point_operations(
        args,
        4,
        seqlen_squared_sum_in_batch=sequences * 16.0**2,
        total_real_tokens_in_batch=sequences * 16.0,
    )
    args.seq_length = 16
    assert packed == training.num_floating_point_operations(args, sequences)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--step35-gate-layout expanded", {}),  # the other rows are redundant work
        ("--step35-window steptron", {"window": "steptron"}),
        ("--mtp-num-layers 1", {"mtp_layers": 1}),
        ("--padded-vocab-size 128", {"vocab_size": 128}),
    ],
)
def test_operations_follow_the_arguments(arguments, words, changes):
    from megatron.training import training

    args = arguments(tiny_config(), words)
    size = {"vocab_size": 96, "mtp_layers": 2} | changes
    config = Step35Config.from_dict(tiny_config())
    expected = training_flops(config, tokens=4 * LENGTH, squared_lengths=4 * LENGTH**2, **size)
    assert training.num_floating_point_operations(args, 4) == expected


# --- Parameters ---------------------------------------------------------------------------------


def test_the_published_models_size_is_printed(arguments, capsys):
    from megatron.training import theoretical_memory_usage as memory

    def printed(words: str) -> dict[str, str]:
        args = arguments(packaged_config_path(), words)
        memory.compute_weight_and_optimizer_memory(args, verbose=True)
        return dict(re.findall(r"^(.*) in billions: *(\S+)", capsys.readouterr().out, re.M))

    assert printed("")["Total number of parameters"] == "199.38"
    assert printed("--step35-gate-layout expanded")["Total number of parameters"] == "201.58"
    # Two of the three MTP layers less, of 0.81 each; 280 of 288 experts idle, 184.97.
    assert printed("--mtp-num-layers 1") == {
        "Number of parameters in transformer block": "195.90",
        "Number of active parameters in transformer block": "10.93",
        "Number of parameters in mtp block": "0.28",  # attention 0.11, FFN 0.14, eh_proj 0.03
        "Number of parameters in embedding layers": "1.58",  # three of 128896 x 4096
        "Total number of parameters": "197.77",
        "Total number of active parameters": "12.80",
        "Number of parameters in most loaded shard": "197.7655",
    }


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "words", "bytes_of_dense", "bytes_of_expert"),
    [
        (1, "", 16, 16),  # weights, gradients, moments in fp32
        (1, "--bf16", 18, 18),
        (1, "--bf16 --optimizer muon", None, 14),
        (8, "--bf16 --use-distributed-optimizer --tensor-model-parallel-size 2 --sequence-parallel "
         "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1", 6 + 12 / 4, 6 + 12 / 2),
        (4, "--bf16 --use-distributed-optimizer --expert-model-parallel-size 2", 9, 12),
    ],
)  # fmt: skip
def test_the_memory_of_weights_and_optimizer_is_reported(
    arguments, world_size, words, bytes_of_dense, bytes_of_expert
):
    from megatron.training import theoretical_memory_usage as memory

    args = arguments(tiny_config(), words, world_size)
    [rank] = reports.rank_parameters(from_settings(settings.active()), args)
    found = memory.compute_weight_and_optimizer_memory(args) - rank.expert * bytes_of_expert
    if bytes_of_dense is None:  # of matrices 14, of embeddings and norms 18
        assert 14 < found / rank.dense < 18
    else:
        assert found == pytest.approx(rank.dense * bytes_of_dense, abs=100)


def test_the_activations_of_the_fullest_stage_are_reported(arguments, capsys):
    """Those that `step35-patch estimate` finds for the same arguments."""
    from megatron.training.theoretical_memory_usage import report_theoretical_memory

    layout = "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Ettt|tttmm|L"
    for words in ("", f"{layout} {FULL_RECOMPUTE}", f"{layout} --seq-length 128"):
        args = arguments(tiny_config(), words, 3)
        args.global_batch_size = 8 * args.data_parallel_size
        found = estimate(Step35Config.from_dict(tiny_config()), from_arguments(args))
        most = max(rank.activations for rank in found.ranks)
        reported = report_theoretical_memory(args, 8, verbose=True)[1] * 1024**2
        assert reported == pytest.approx(most)
        printed = capsys.readouterr().out
        for rank in found.ranks:
            held = f"stage {rank.pp}: {rank.micro_batches:.2f} micro-batches in flight"
            assert f"{held}, {rank.activations / 1024**2:.1f} MB" in printed


def test_logged_balancing_losses_are_means_over_the_moe_layers(tmp_path):
    """Four of six layers are MoE; the two MTP layers are dense, and Megatron-Core counts them."""
    from megatron.core.transformer.moe import moe_utils
    from support.ours import initialize_megatron

    initialize_megatron()
    name, logged = "load_balancing_loss", {}
    for layer in (3, 4, 5, 6):
        moe_utils.save_to_aux_losses_tracker(name, torch.tensor(0.5), layer, num_layers=8)
    step35_patch.activate(tiny_config())
    try:
        moe_utils.track_moe_metrics(
            loss_scale=1.0,
            iteration=1,
            writer=None,
            total_loss_dict=logged,
            force_initialize=True,
            track_names=[name],
            num_layers=6,
            moe_layer_freq=[0, 0, 1, 1, 1, 1],
            mtp_num_layers=2,
        )
    finally:
        step35_patch.activate()
    assert logged[name].item() == 0.5
