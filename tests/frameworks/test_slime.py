"""What slime calls: the model provider, and the weights it sends."""

from __future__ import annotations

import inspect
import sys
import types
from importlib import import_module

import pytest
import torch
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE
from support.ours import build, initialize_megatron, run
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

import step35_patch
from step35_patch import Step35ActivationError
from step35_patch.arguments import CPU_ARGUMENTS
from step35_patch.checkpoint import load_hf_weights
from step35_patch.frameworks import slime_init, slime_provider

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

# Of slime's, what is asked for.
ARGS = types.SimpleNamespace(expert_model_parallel_size=1, moe_grouped_gemm=False)
GLOBAL_VARS = "megatron.training.global_vars"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A published folder that the environment names."""
    initialize_megatron()
    config = tiny_config()
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config, 81))
    monkeypatch.setenv("STEP35_CONFIG", str(folder))
    step35_patch.activate()
    yield folder
    monkeypatch.delenv("STEP35_CONFIG")
    step35_patch.activate()


@pytest.fixture
def arguments(folder, monkeypatch):
    """A function that sets Megatron's arguments, as slime sets them."""
    from megatron.training import arguments

    module = import_module(GLOBAL_VARS)
    monkeypatch.setattr(module, "_GLOBAL_ARGS", None)

    def parse(*words: str):
        line = [
            "slime",
            *("--micro-batch-size", "1", "--seq-length", "24", "--lr", "1e-4"),
            *("--mock-data", "--train-iters", "1"),
            *CPU_ARGUMENTS,
            *("--transformer-impl", IMPLEMENTATION),
            *(["--moe-grouped-gemm"] if ON_TRANSFORMER_ENGINE else []),
            *words,
        ]
        monkeypatch.setattr(sys, "argv", line)
        args = arguments.parse_args()
        args.rank, args.world_size = 0, 1
        arguments.validate_args(args)
        args.padded_vocab_size = args.padded_vocab_size or 96  # as slime does
        module._GLOBAL_ARGS = args
        return args

    return parse


def assert_same_model(model: torch.nn.Module, folder) -> None:
    """Loaded with the folder's weights, it computes what the package's own provider's does."""
    load_hf_weights(model, folder)
    tokens, labels = random_tokens(81, 2, 24)
    wanted = build(folder)
    assert [*dict(model.named_parameters())] == [*dict(wanted.named_parameters())]
    assert torch.equal(run(model, tokens), run(wanted, tokens))
    assert torch.equal(run(model, tokens, labels), run(wanted, tokens, labels))


def test_signature_is_slime_s():
    assert [*inspect.signature(slime_provider).parameters] == [
        "pre_process",
        "post_process",
        "vp_stage",
    ]


def test_provider_builds_the_environment_s_model_with_megatron_s_arguments(folder, arguments):
    arguments()
    model = slime_provider(pre_process=True, post_process=True, vp_stage=None)
    assert model.max_sequence_length == tiny_config()["max_position_embeddings"]
    assert_same_model(model, folder)


def test_provider_takes_what_the_arguments_say(folder, arguments):
    arguments("--mtp-num-layers", "0", "--step35-window", "steptron")
    model = slime_provider(pre_process=True, post_process=False)
    assert not hasattr(model, "output_layer")
    assert not hasattr(model, "mtp")
    assert model.decoder.layers[1].config.window_size == (8, 0)


def test_provider_hands_on_the_stage_and_the_loss_s_precision(folder, arguments):
    arguments("--fp16", "--fp16-lm-cross-entropy", "--mtp-num-layers", "0")
    model = slime_provider(pre_process=False, post_process=True)
    assert not hasattr(model, "embedding")
    assert model.output_layer.weight.dtype == torch.float16
    assert model.fp16_lm_cross_entropy


def test_without_arguments_the_groups_sizes_decide(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, GLOBAL_VARS, raising=False)
    model = slime_provider()
    assert model.config.tensor_model_parallel_size == 1
    assert model.config.step35.config.fingerprint == build(folder).config.step35.config.fingerprint


@pytest.mark.parametrize("function", [slime_provider, lambda: slime_init(ARGS)])
def test_without_a_config_it_is_refused(monkeypatch, function):
    initialize_megatron()
    monkeypatch.delenv("STEP35_CONFIG", raising=False)
    step35_patch.activate()
    with pytest.raises(Step35ActivationError, match=r"expected a Step-3\.5 config, found none"):
        function()


@pytest.fixture
def slime_weights(monkeypatch):
    """A module as slime's, whose function knows another model only."""
    module = types.ModuleType("slime.backends.megatron_utils.megatron_to_hf")
    module._convert_to_hf_core = lambda args, model_name, name, param: [(model_name, param)]
    names = module.__name__.split(".")
    for depth in range(1, len(names)):
        package = types.ModuleType(".".join(names[:depth]))
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_slime_sends_step35_s_weights_as_published(folder, slime_weights):
    model = build(folder)
    slime_init(ARGS)
    once = slime_weights._convert_to_hf_core
    slime_init(ARGS)
    assert slime_weights._convert_to_hf_core is once
    sent = {}
    buffers = {name: b for name, b in model.named_buffers() if name.endswith("expert_bias")}
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        convert = slime_weights._convert_to_hf_core
        sent |= dict(convert(None, "step3p5config", f"module.module.{name}", tensor))
    weights = random_weights(tiny_config(), 81)
    assert set(sent) == set(weights)
    assert all(torch.equal(sent[name], weights[name]) for name in weights)


def test_other_models_weights_are_slime_s_own(folder, slime_weights):
    slime_init(ARGS)
    tensor = torch.zeros(1)
    assert slime_weights._convert_to_hf_core(None, "qwen3", "x", tensor) == [("qwen3", tensor)]


def test_slime_without_that_function_is_refused(folder, slime_weights):
    del slime_weights._convert_to_hf_core
    with pytest.raises(RuntimeError, match="expected _convert_to_hf_core, found no such function"):
        slime_init(ARGS)


def test_experts_that_slime_would_count_wrongly_are_refused(folder, slime_weights):
    args = types.SimpleNamespace(expert_model_parallel_size=2, moe_grouped_gemm=False)
    with pytest.raises(ValueError, match="--moe-grouped-gemm: expected it with"):
        slime_init(args)
    args.moe_grouped_gemm = True
    slime_init(args)
