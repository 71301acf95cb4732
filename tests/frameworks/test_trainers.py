"""Trainers' own model-provider and weight-sync code with this package's model.

It is fetched by whoever runs this, and not copied: STEP35_TEST_SLIME and STEP35_TEST_AREAL are each
a checkout and folders with what it imports, with colons. docs/frameworks.md names the commits.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from support.implementation import ON_TRANSFORMER_ENGINE
from support.ours import build, initialize_megatron, run
from support.provider_layouts import EP, PP, TP
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

import step35_patch
from step35_patch.checkpoint import load_hf_weights

SLIME, AREAL = (os.environ.get(f"STEP35_TEST_{name}") for name in ("SLIME", "AREAL"))

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

needs_slime = pytest.mark.skipif(SLIME is None, reason="STEP35_TEST_SLIME names no checkout")
needs_areal = pytest.mark.skipif(AREAL is None, reason="STEP35_TEST_AREAL names no checkout")

LAYOUTS = {
    "tp2 and pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
    "tp2, expanded gate": (2, {TP: 2, "sequence_parallel": True, "gate_layout": "expanded"}),
}
if ON_TRANSFORMER_ENGINE:  # neither trainer counts experts that are modules of their own
    LAYOUTS["expert parallel"] = (2, {EP: 2})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a vocabulary that two ranks pad."""
    config = tiny_config(vocab_size=95, pad_token_id=94)
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config, 95))
    monkeypatch.setenv("STEP35_CONFIG", str(folder))
    yield folder
    monkeypatch.delenv("STEP35_CONFIG")
    step35_patch.activate()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("trainer", "paths"),
    [
        pytest.param("slime", SLIME, marks=needs_slime),
        pytest.param("areal", AREAL, marks=needs_areal),
    ],
)
def test_trainer_sends_the_published_tensors(ranks, folder, trainer, paths, layout):
    processes, options = LAYOUTS[layout]
    if trainer == "areal" and EP in options:
        pytest.skip("AReaL gathers experts over the ranks in its engine, which wants a GPU")
    code = f"from support import trainer_worker; trainer_worker.{trainer}(*arguments)"
    ended = ranks.run(code, processes, paths, folder, json.dumps(options))
    assert ended.statuses == [0] * processes, ended.text[-6000:]
    assert ended.text.count(" sent\n") == processes


@pytest.fixture
def slime_models(folder, monkeypatch):
    """slime's function that chooses a model provider, and the arguments for it."""
    from megatron.training import arguments

    from step35_patch.arguments import CPU_ARGUMENTS

    for path in reversed(SLIME.split(os.pathsep)):
        monkeypatch.syspath_prepend(path)
    initialize_megatron()
    step35_patch.activate()

    def provider(*words: str, role: str = "actor"):
        from slime.backends.megatron_utils.model_provider import get_model_provider_func

        line = ["slime", *("--micro-batch-size", "1", "--seq-length", "24", "--lr", "1e-4")]
        line += ["--mock-data", "--train-iters", "1", *CPU_ARGUMENTS, *words]
        monkeypatch.setattr(sys, "argv", line)
        args = arguments.parse_args()
        args.rank, args.world_size = 0, 1
        arguments.validate_args(args)
        args.padded_vocab_size = args.padded_vocab_size or 95
        monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", args)
        args.custom_model_provider_path = "step35_patch.frameworks.slime_provider"
        ours = get_model_provider_func(args, role)
        args_of_its_own = type(args)(**vars(args) | {"custom_model_provider_path": None})
        return ours, get_model_provider_func(args_of_its_own, role)

    return provider


@needs_slime
@pytest.mark.parametrize("which", [0, 1], ids=["slime_provider", "slime's own"])
def test_slime_builds_the_model(folder, slime_models, which):
    model = slime_models()[which](pre_process=True, post_process=True)
    load_hf_weights(model, folder)
    tokens, labels = random_tokens(95, 2, 24)
    tokens, labels = tokens % 94, labels % 94
    wanted = build(folder, transformer_impl="local", moe_grouped_gemm=False)
    assert torch.equal(run(model, tokens), run(wanted, tokens))
    assert torch.equal(run(model, tokens, labels), run(wanted, tokens, labels))


@needs_slime
@pytest.mark.parametrize("which", [0, 1], ids=["slime_provider", "slime's own"])
def test_slime_s_critic_has_values_without_mtp_layers(slime_models, which):
    tokens = random_tokens(95, 2, 24)[0] % 94
    model = slime_models("--mtp-num-layers", "0", role="critic")[which]()
    assert run(model, tokens).shape == (2, 24, 1)
    model = slime_models(role="critic")[which]()
    with pytest.raises(RuntimeError, match=r"LinearForLastLayer .* --mtp-num-layers 0"):
        run(model, tokens)
