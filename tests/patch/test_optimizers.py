"""Which optimizers train a Step-3.5 model, what they are told, and that no other model notices."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.ours import build, initialize_megatron, make_optimizer
from support.reference import random_weights, tiny_config, write_hf_folder

import step35_patch
from step35_patch.arguments import CPU_ARGUMENTS
from step35_patch.patch.parse_args import Step35ArgumentError

pytestmark = pytest.mark.megatron

# After step35_patch: megatron is imported by it.
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    config = tiny_config()
    return write_hf_folder(tmp_path / "hf", config, random_weights(config, 5))


def optimizer_of(model: torch.nn.Module, **options):
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.0, "optimizer": "muon"}
    return make_optimizer(OptimizerConfig(**(settings | options)), [chunk])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "soap"}, "optimizer: expected 'adam' or .* found 'soap'; .* merged weights"),
        ({"muon_split_qkv": False}, "muon_split_qkv: expected True, found False"),
    ],
)
def test_optimizers_of_merged_weights_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(build(folder), **options)


def test_missing_package_is_named(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "emerging_optimizers" else find_spec(name, *more),
    )
    with pytest.raises(ImportError, match=r"not installed; pip install 'step35-patch\[muon\]'"):
        optimizer_of(build(folder))


def test_output_matrices_are_not_muons(folder):
    """If somebody marks them as what they are not, Muon would orthogonalize a vocabulary."""
    pytest.importorskip("emerging_optimizers")
    model = build(folder)
    for parameter in model.mtp_output_heads.parameters():
        parameter.is_embedding_or_output_parameter = False
    with pytest.raises(RuntimeError, match=r"Muon has a parameter \[96, 32\] that is no published"):
        optimizer_of(model)


def test_other_models_train_as_before(folder):
    """Bit for bit, with another model's Step-3.5 config active and not."""
    pytest.importorskip("emerging_optimizers")
    initialize_megatron()
    try:
        step35_patch.activate(folder)
        found = _stock_weights()
    finally:
        step35_patch.activate()
    step35_patch.deactivate()
    try:
        wanted = _stock_weights()
    finally:
        step35_patch.activate()
    assert any(not torch.equal(a, b) for a, b in zip(found, _stock_weights(steps=0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _stock_weights(steps: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        transformer_impl="local",
        use_cpu_initialization=True,
    )
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=16)
    optimizer = optimizer_of(model)
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer soap", "--optimizer: expected adam, found soap; .* merged weights"),
        ("--optimizer muon --muon-no-split-qkv", "--muon-split-qkv: expected True, found False"),
        (
            "--step35-decay-1d --weight-decay 0",
            "--weight-decay: expected more than 0 with --step35-decay-1d, found 0",
        ),
        (
            "--step35-decay-1d --apply-wd-to-qk-layernorm",
            "--apply-wd-to-qk-layernorm: expected none with --step35-decay-1d, which covers it",
        ),
    ],
)
def test_arguments_are_refused(parse, words, message):
    try:
        with pytest.raises(Step35ArgumentError, match=message):
            parse(*words.split(), config=tiny_config())
    except SystemExit:  # argparse's, of a Megatron-Core without that optimizer
        pytest.skip(f"{words} is not in this Megatron-Core")


def test_distributed_muon_needs_bf16(parse):
    args = parse(*"--optimizer dist_muon --bf16".split(), config=tiny_config())
    if not hasattr(args, "use_layer_wise_param_layout"):
        pytest.skip("this Megatron-Core makes it in fp32 too")
    with pytest.raises(
        Step35ArgumentError, match="--bf16: expected it with --optimizer dist_muon and a distrib"
    ):
        parse(*"--optimizer dist_muon".split(), config=tiny_config())
    with pytest.raises(
        Step35ArgumentError, match="--bf16: expected it with --optimizer muon and a distributed"
    ):
        parse(*"--optimizer muon --use-distributed-optimizer".split(), config=tiny_config())


@pytest.mark.parametrize("decays", [True, False])
def test_one_dimensional_weights_decay_where_it_is_asked_for(parse, folder, decays):
    from megatron.training import training
    from megatron.training.arguments import validate_args

    args = parse(
        *"--seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 1e-3".split(),
        *"--tokenizer-type NullTokenizer --mock-data".split(),
        *CPU_ARGUMENTS,
        *(["--step35-decay-1d"] if decays else []),
        config=tiny_config(),
    )
    validate_args(args)
    config, overrides = training.get_megatron_optimizer_config(args)
    model = build(folder)
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = make_optimizer(config, [chunk], config_overrides=overrides)
    multipliers = {
        parameter: group["wd_mult"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    norms = [multipliers[p] for p in model.parameters() if p.dim() == 1]
    assert norms and set(norms) == {1.0 if decays else 0.0}
    assert {multipliers[p] for p in model.parameters() if p.dim() == 2} == {1.0}
