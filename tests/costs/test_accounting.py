"""Operations, parameters and memory against built models, torch's counter and published sizes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from support.ours import build, run
from support.reference import (
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)
from torch.utils.flop_counter import FlopCounterMode

import step35_patch
from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.costs.accounting import flops_by_part, stage_flops, training_flops
from step35_patch.costs.estimate import total_parameters, weights_of_rank
from step35_patch.costs.launch import Launch, stages
from step35_patch.costs.weights import Parameters, stage_weights

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def published() -> Step35Config:
    return Step35Config.from_pretrained(packaged_config_path())


def test_matrix_products_are_those_that_run():
    """Of the reference's forward; attention's own products are left out by way of two lengths."""
    config = tiny_config()
    reference = Reference(config, random_weights(config, 61))
    input_ids, labels = random_tokens(61, 1, 24)
    with FlopCounterMode(display=False) as counter:
        reference.losses(input_ids, labels)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(counts.values())
    # torch counts the masked scores, too: 4 operations for each pair, head and channel.
    plans = Step35Config.from_dict(config).layers
    scores = sum(4 * p.num_attention_heads * p.kv_channels * 24**2 for p in plans)
    size = {"tokens": 24, "vocab_size": 96, "mtp_layers": 2}
    parsed = Step35Config.from_dict(config)
    forward = training_flops(parsed, squared_lengths=0.0, **size) / 3
    assert counted - scores == pytest.approx(forward, rel=1e-6)


@pytest.mark.parametrize("length", [6, 8, 9, 40])
def test_attention_counts_visible_keys(length):
    config = Step35Config.from_dict(tiny_config())
    size = {"tokens": 2 * length, "vocab_size": 96, "mtp_layers": 2}
    attention = training_flops(config, squared_lengths=2 * length**2, **size)
    attention -= training_flops(config, squared_lengths=0.0, **size)
    expected = 0.0
    for plan in config.layers:
        window = length if plan.window_size is None else plan.window_size[0] + 1
        # Megatron counts half a key for a query's own.
        keys = sum(min(i + 0.5, window) for i in range(length))
        expected += 3 * 4 * plan.num_attention_heads * plan.kv_channels * 2 * keys
    assert attention == pytest.approx(expected, rel=0.02)


def test_published_model_costs_what_is_active(published):
    """About six operations a token for each of its 11 B active parameters, MTP layers left out."""
    flops = training_flops(
        published, tokens=1, squared_lengths=0.0, vocab_size=128896, mtp_layers=0
    )
    assert 10.5e9 < flops / 6 < 11.5e9


def test_operations_by_part_and_by_stage(published):
    """By hand, of one token of a sequence of 8192; stages and parts add up to the same."""
    parts = flops_by_part(
        published, tokens=1, squared_lengths=8192, vocab_size=128896, mtp_layers=3
    )
    heads = 128 * 4096 * 2  # of a channel: into and out of attention
    full, sliding = 12 * 64, 33 * 96
    groups = 45 * 2 * 8 * 128 * 4096
    gates = (full + sliding) * 4096
    expected = {
        "attention_projections": (full + sliding) * heads + groups + gates,
        "full_attention": full * 2 * 128 * 4096,
        "sliding_attention": sliding * 2 * 128 * (512 - 512**2 / (2 * 8192)),
        "dense_ffn": 3 * 3 * 4096 * 11264,
        "routers": 42 * 288 * 4096,
        "routed_experts": 42 * 8 * 3 * 4096 * 1280,
        "shared_experts": 42 * 3 * 4096 * 1280,
        "output": 128896 * 4096,
    }
    mtp = parts.pop("mtp")
    assert parts == {part: 6 * count for part, count in expected.items()}
    launch = Launch(
        num_layers=45,
        padded_vocab_size=128896,
        mtp_num_layers=3,
        seq_length=8192,
        pipeline_model_parallel_size=8,
        virtual_pipeline_model_parallel_size=3,
        pipeline_model_parallel_layout="Ett|(tt|)*21t|mmmL",
    )
    by_stage = [stage_flops(published, launch, stage) for stage in stages(launch)]
    assert sum(by_stage) == pytest.approx(mtp + sum(parts.values()))
    assert by_stage[-1] == pytest.approx(mtp + parts["output"])


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
@pytest.mark.parametrize("mtp_layers", [2, 1, None])
def test_parameters_are_those_of_the_built_model(tmp_path, gate_layout, mtp_layers):
    config = tiny_config()
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config, 62))
    model = build(folder, gate_layout=gate_layout, mtp_num_layers=mtp_layers)
    launch = Launch(
        num_layers=6, padded_vocab_size=96, mtp_num_layers=mtp_layers or 0, gate_layout=gate_layout
    )
    found = Parameters.of(
        weights_of_rank(Step35Config.from_dict(config), launch, stages(launch), 0)
    )
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    assert found == Parameters(dense=total - experts, expert=experts)


@pytest.mark.parametrize(("gate_layout", "more"), [("headwise", 0), ("expanded", 2_197_291_008)])
def test_ranks_add_up_to_the_published_model(published, gate_layout, more):
    """TP 8, PP 5, EP 16, ETP 1: what is whole on each tensor-parallel rank counts once."""
    split = Launch(
        num_layers=45,
        padded_vocab_size=128896,
        mtp_num_layers=3,
        gate_layout=gate_layout,
        world_size=640,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=5,
        expert_model_parallel_size=16,
    )
    alone = replace(split, tensor_model_parallel_size=1, expert_model_parallel_size=1)
    total = Parameters()
    for stage in stages(split):
        own = Parameters.of(stage_weights(published, split, stage))
        whole = Parameters.of(stage_weights(published, alone, stage))
        # Norms and routers are whole on each of the eight ranks.
        plans = [published.layers[index] for index in stage.layers]
        kept = sum(
            2 * 4096 + 2 * 128 + plan.is_moe * 288 * 4096 + plan.is_mtp * 3 * 4096 for plan in plans
        )
        kept += 4096 if stage.output else 0
        assert 8 * (own.dense - kept) + kept == whole.dense
        assert 16 * own.expert == whole.expert
        total = total + whole
    embedding_copy = 128896 * 4096  # of the stage with the MTP layers
    router_biases = 42 * 288
    assert total.total == 199_384_301_376 - router_biases + embedding_copy + more


@pytest.fixture
def megatron_args(tmp_path, monkeypatch):
    """Megatron's arguments, parsed and validated with a config active."""
    from megatron.training.arguments import parse_args, validate_args

    def parse(config: dict, *words: str):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        line = ["pretrain_gpt.py", "--step35-config", str(path), *words]
        line += """--seq-length 64 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data
            --transformer-impl local --tokenizer-type NullTokenizer --no-persist-layer-norm
            --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion""".split()
        monkeypatch.setattr(sys, "argv", line)
        args = parse_args()
        validate_args(args)
        return args

    yield parse
    step35_patch.activate()


def test_megatron_prints_these_numbers(megatron_args, capsys):
    from megatron.training import training
    from megatron.training.theoretical_memory_usage import report_theoretical_memory

    args = megatron_args(tiny_config())
    config = Step35Config.from_dict(tiny_config())
    expected = training_flops(
        config, tokens=4 * 64, squared_lengths=4 * 64**2, vocab_size=96, mtp_layers=2
    )
    assert training.num_floating_point_operations(args, 4) == expected
    weights, activations, total = report_theoretical_memory(args, 1, verbose=True)
    launch = Launch(num_layers=6, padded_vocab_size=96, mtp_num_layers=2)
    parameters = total_parameters(config, launch)
    assert weights == pytest.approx(16 * parameters / 1024**2)  # in fp32
    assert total == weights + activations and activations > 0
    assert "Step-3.5 pipeline stage 0" in capsys.readouterr().out
    step35_patch.activate()  # inert: Megatron's own numbers again
    args.mtp_num_layers = None
    assert training.num_floating_point_operations(args, 4) != expected


def test_model_runs_what_is_counted(tmp_path):
    """Our layers run the same matrix products as the reference, by torch's count of each kind."""
    config = tiny_config(num_nextn_predict_layers=0, use_moe=False, moe_layers_enum="")
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits"):
        config[name] = config[name][:6]
    config["swiglu_limits_shared"] = config["swiglu_limits_shared"][:6]
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config, 63))
    model = build(folder)
    input_ids, _ = random_tokens(63, 1, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model, input_ids)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "attention" not in str(op))
    parsed = Step35Config.from_dict(config)
    expected = training_flops(parsed, tokens=24, squared_lengths=0.0, vocab_size=96, mtp_layers=0)
    assert products == pytest.approx(expected / 3, rel=1e-6)
