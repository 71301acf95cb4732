"""mbridge's AutoBridge with this package's model.

STEP35_TEST_MBRIDGE is a checkout of mbridge and folders with what it imports, with colons: its
release does not run on the tested Megatron-Cores.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE
from support.ours import build, initialize_megatron, run
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

PATHS = os.environ.get("STEP35_TEST_MBRIDGE")
if PATHS is None:
    pytest.skip("STEP35_TEST_MBRIDGE names no checkout", allow_module_level=True)
sys.path += PATHS.split(os.pathsep)

import mbridge  # noqa: E402

import step35_patch  # noqa: E402
import step35_patch.frameworks.mbridge  # noqa: E402

OPTIONS = {
    "transformer_impl": IMPLEMENTATION,
    "moe_grouped_gemm": ON_TRANSFORMER_ENGINE,
    "use_cpu_initialization": True,
}


@pytest.fixture
def published(tmp_path):
    initialize_megatron()
    config = tiny_config(architectures=["Step3p5ForCausalLM"])
    weights = random_weights(config, 97)
    return weights, write_hf_folder(tmp_path / "hf", config, weights)


def bridge_of(folder, **options):
    bridge = mbridge.AutoBridge.from_pretrained(str(folder), dtype=torch.float32)
    bridge.set_extra_args(**(OPTIONS | options))
    return bridge


def test_it_builds_loads_exports_and_saves_the_model(published, tmp_path):
    weights, folder = published
    bridge = bridge_of(folder, gate_layout="expanded")
    models = bridge.get_model(weight_path=str(folder), bf16=False)
    tokens, labels = random_tokens(97, 2, 24)
    wanted = build(folder, gate_layout="expanded")
    assert torch.equal(run(models[0], tokens, labels), run(wanted, tokens, labels))
    exported = dict(bridge.export_weights(models))
    assert set(exported) == set(weights)
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    bridge.save_weights(models, str(tmp_path / "saved"))
    files = (tmp_path / "saved").glob("*.safetensors")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(saved) == set(weights)
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_mbridge_s_value_head_has_values(published):
    from mbridge.utils.post_creation_callbacks import make_value_model

    _, folder = published
    bridge = bridge_of(folder, mtp_num_layers=None)
    models = bridge.get_model(bf16=False, post_model_creation_callbacks=[make_value_model])
    assert run(models[0], random_tokens(97, 2, 24)[0]).shape == (2, 24, 1)


def test_process_s_choices_are_taken(published):
    step35_patch.activate(gate_layout="expanded", window="steptron", padded_logits="kept")
    try:
        config = bridge_of(published[1]).config
    finally:
        step35_patch.activate()
    assert (config.gate_layout, config.window, config.padded_logits) == (
        "expanded",
        "steptron",
        "kept",
    )
    assert config.params_dtype == torch.float32
    assert not config.bf16


def test_multiple_for_the_vocabulary_is_refused(published):
    with pytest.raises(ValueError, match="make_vocab_size_divisible_by: expected None, found 128"):
        mbridge.AutoBridge.from_pretrained(str(published[1]), make_vocab_size_divisible_by=128)


def test_config_without_a_folder_is_refused(published):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(published[1]))
    config.name_or_path = ""
    with pytest.raises(ValueError, match=r"hf_config\.name_or_path: expected the model's folder"):
        mbridge.AutoBridge.from_config(config)


def test_broken_config_is_refused(published):
    _, folder = published
    document = json.loads((folder / "config.json").read_text()) | {"moe_top_k": 99}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="moe_top_k"):
        mbridge.AutoBridge.from_pretrained(str(folder))
