"""Folders of transformers' `save_pretrained`, read as they are; a loss needs its option."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.comparison import LENGTH
from support.converted import SMALL_FILES, assert_same, read, weights_of
from support.reference import tiny_config, write_hf_folder
from support.resaved import load_by_transformers

from step35_patch import Step35Config
from step35_patch.cli import main
from step35_patch.convert import convert_to_hf, convert_to_megatron
from step35_patch.storage.errors import CheckpointError


@pytest.fixture(scope="module", params=[True, False], ids=["published names", "own names"])
def saved(request, tmp_path_factory) -> SimpleNamespace:
    """A bf16 model as transformers saves it, and the weights that are in it by published name."""
    top = tmp_path_factory.mktemp("saved")
    config = tiny_config(torch_dtype="bfloat16")
    weights = weights_of(config)
    source = write_hf_folder(top / "published", config, weights)
    model = load_by_transformers(source, config, torch.bfloat16)
    model.save_pretrained(top / "saved", max_shard_size="60KB", save_original_format=request.param)
    assert len(list((top / "saved").glob("model-*.safetensors"))) > 2
    decoder = {
        n: t for n, t in weights.items() if not n.startswith(("model.layers.6", "model.layers.7"))
    }
    rounded = {
        n: t.bfloat16().float() if n.endswith("router_bias") else t for n, t in decoder.items()
    }
    assert any(not torch.equal(rounded[name], decoder[name]) for name in decoder)
    return SimpleNamespace(folder=top / "saved", published=source, weights=rounded)


def test_losses_are_named_with_their_options(saved, tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert_to_megatron(saved.folder, tmp_path / "m")
    mtp, bias = error.value.problems
    assert "2 MTP layers" in mtp and "--without-mtp (without_mtp=True)" in mtp
    assert "dtype BF16" in bias and "4 router biases were rounded" in bias
    assert "--accept-rounded-router-bias (accept_rounded_router_bias=True)" in bias
    assert not (tmp_path / "m").exists()


def test_conversion_there_and_back(saved, tmp_path, capsys):
    out, back = tmp_path / "m", tmp_path / "back"
    words = ["--without-mtp", "--accept-rounded-router-bias", "--check"]
    assert main(["convert", "to-megatron", str(saved.folder), str(out), *words]) == 0
    said = capsys.readouterr().err
    assert "4 router biases were rounded to BF16 when they were saved, and are taken" in said
    assert "tensors of a vision model are left alone" in said
    hf = ["--hf-dir", str(saved.folder), "--without-mtp", "--check"]
    assert main(["convert", "to-hf", str(out), str(back), *hf]) == 0
    assert_same(read(back), saved.weights)
    # What is written is read without any option, also with the config as transformers spells it.
    config = Step35Config.from_pretrained(back)
    assert config.num_nextn_predict_layers == 0 and len(config.layers) == 6
    convert_to_megatron(back, tmp_path / "again", options=SMALL_FILES)


@pytest.mark.megatron
def test_verify_takes_it(saved, capsys):
    words = ["verify", str(saved.folder), "--length", str(LENGTH)]
    assert main(words) == 2
    assert "--accept-rounded-router-bias" in capsys.readouterr().err
    assert main([*words, "--no-mtp", "--accept-rounded-router-bias"]) == 0
    assert "AGREE" in capsys.readouterr().out


@pytest.mark.parametrize("own_names", [False, True])
def test_what_loses_nothing_needs_no_option(tmp_path, own_names):
    """Saved in fp32, of a model without MTP layers; only the outer config names the dtype."""
    config = json.loads(json.dumps(Step35Config.from_dict(tiny_config()).without_mtp().to_dict()))
    weights = weights_of(config)
    source = write_hf_folder(tmp_path / "published", config, weights)
    model = load_by_transformers(source, config, torch.float32)
    model.save_pretrained(tmp_path / "saved", save_original_format=not own_names)
    file = tmp_path / "saved" / "config.json"
    document = json.loads(file.read_text())
    assert document["dtype"] == "float32"
    del document["text_config"]["dtype"]
    file.write_text(json.dumps(document))
    convert_to_megatron(tmp_path / "saved", tmp_path / "m")
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=tmp_path / "saved")
    assert_same(read(tmp_path / "back"), weights)
