"""Models without the config's MTP layers: loaded, trained from a converted checkpoint, saved."""

from __future__ import annotations

import json

import pytest
import torch
from support.converted import assert_same, read, weights_of
from support.ours import build, initialize_megatron, run
from support.parity import LOGITS, relative
from support.reference import Reference, random_tokens, random_weights, tiny_config, write_hf_folder
from support.resaved import load_by_transformers, logits

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights, save_hf_weights
from step35_patch.storage.errors import CheckpointError

pytestmark = pytest.mark.megatron


@pytest.fixture
def case(tmp_path):
    config = tiny_config()
    weights = random_weights(config, 71)
    return config, weights, write_hf_folder(tmp_path / "hf", config, weights)


def decoder_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in weights.items() if ".layers.6." not in n and ".layers.7." not in n}


@pytest.mark.parametrize("without", [None, 0])
def test_published_folder_gives_the_decoder(case, without):
    config, weights, folder = case
    model = build(folder, mtp_num_layers=without)
    assert model.config.mtp_num_layers is None and not getattr(model, "mtp_process", False)
    tokens, _ = random_tokens(3, 2, 24)
    reference = Reference(config, weights)
    expected = reference.logits(reference.hidden_states(tokens))
    assert relative(run(model, tokens), expected) < LOGITS


@pytest.mark.parametrize("own_names", [False, True], ids=["published names", "own names"])
def test_folder_that_transformers_saved_gives_its_logits(case, tmp_path, own_names):
    """In bf16, so that the router's bias is rounded; both compute in fp32 then."""
    config = case[0] | {"torch_dtype": "bfloat16"}
    published = write_hf_folder(tmp_path / "published", config, weights_of(config, 72))
    saved = tmp_path / "saved"
    theirs = load_by_transformers(published, config, torch.bfloat16)
    theirs.save_pretrained(saved, save_original_format=not own_names)
    initialize_megatron()
    options = {"transformer_impl": "local", "use_cpu_initialization": True}
    whole = Step35ModelProvider.from_hf(saved, **options).provide()
    with pytest.raises(CheckpointError, match=r"--mtp-num-layers 0 \(mtp_num_layers=None\)"):
        load_hf_weights(whole, saved, accept_rounded_router_bias=True)
    model = Step35ModelProvider.from_hf(saved, mtp_num_layers=None, **options).provide()
    with pytest.raises(CheckpointError, match="accept_rounded_router_bias=True") as error:
        load_hf_weights(model, saved)
    assert len(error.value.problems) == 1
    load_hf_weights(model, saved, accept_rounded_router_bias=True)
    tokens, _ = random_tokens(4, 2, 24)
    assert relative(run(model, tokens), logits(theirs.float(), tokens)) < LOGITS


@pytest.mark.parametrize("built", [None, 1, 2])
def test_saved_without_mtp(case, tmp_path, built):
    """Whether the model has none, some or all of them; the folder is whole for everybody."""
    config, weights, folder = case
    model = build(folder, mtp_num_layers=built)
    if built != 2:
        with pytest.raises(ValueError, match="without_mtp=True"):
            save_hf_weights(model, tmp_path / "out")
    with pytest.raises(ValueError, match="mtp_from: expected None with without_mtp"):
        save_hf_weights(model, tmp_path / "out", mtp_from=folder, without_mtp=True)
    save_hf_weights(model, tmp_path / "out", without_mtp=True)
    assert_same(read(tmp_path / "out"), decoder_of(weights))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    cut = {name: v[:6] for name, v in config.items() if isinstance(v, list) and len(v) == 8}
    assert len(cut) == 5
    assert written == config | cut | {"num_nextn_predict_layers": 0}

    tokens, _ = random_tokens(5, 2, 24)
    again = run(build(tmp_path / "out"), tokens)
    assert (
        relative(
            again, logits(load_by_transformers(tmp_path / "out", written, torch.float32), tokens)
        )
        < LOGITS
    )
    assert torch.equal(again, run(build(folder, mtp_num_layers=None), tokens))


def test_config_without_mtp_in_either_spelling():
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    # The published clamps of MTP layers are none; what transformers saves has no place for others.
    config = Step35Config.from_dict(tiny_config(swiglu_limits=None, swiglu_limits_shared=None))
    text = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    resaved = Step35Config.from_dict(
        json.loads(Step3p7TextConfig(**text, dtype="float32").to_json_string())
    )
    assert resaved.layers == config.layers and len(config.layers) == 8
    for short in (config.without_mtp(), resaved.without_mtp(), config.without_mtp().without_mtp()):
        assert short.layers == config.layers[:6]
        assert short.num_nextn_predict_layers == 0
        # transformers reads it, lists and all.
        Step3p7TextConfig.from_dict(short.to_dict())
