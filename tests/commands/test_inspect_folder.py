"""`step35-patch inspect FOLDER`: safetensors held against their config, by their headers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.config_samples import published, tiny

from step35_patch.cli import main
from step35_patch.config import Step35Config
from step35_patch.storage.hf_folder import DTYPES, header
from step35_patch.tensors.published import published_tensors


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    return tmp_path


def tensors() -> dict[str, torch.Tensor]:
    return {
        info.name: torch.zeros(info.shape, dtype=DTYPES[info.dtype])
        for info in published_tensors(Step35Config.from_dict(tiny()))
    }


def test_weights_that_fit(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    without = capsys.readouterr().out
    save_file(tensors(), folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out == without + "weights     1 files: as the config expects\n"


def test_each_kind_of_difference_is_named(folder, capsys):
    wrong = tensors()
    norm, head = "model.norm.weight", "lm_head.weight"
    query = "model.layers.0.self_attn.q_proj.weight"
    del wrong[norm]
    wrong["model.layers.0.bias"] = torch.zeros(3)
    wrong[query] = wrong[query][:-1].contiguous()
    wrong[head] = wrong[head].bfloat16()
    save_file(wrong, folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "weights     1 files: 4 problems\n" in out
    assert f"{norm}: missing" in out
    assert "model.layers.0.bias: unexpected" in out
    assert f"{query}: shape (31, 24) in model.safetensors, expected (32, 24)" in out
    assert f"{head}: dtype BF16 in model.safetensors, expected F32" in out
    assert main(["inspect", str(folder), "--json"]) == 1
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert len(weights["problems"]) == 4 and weights["files"] == 1


def test_many_differences_are_cut_short(folder, capsys):
    save_file({}, folder / "model.safetensors")
    number = len(tensors())
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    shown = out.count(": missing\n")
    assert 0 < shown < number
    assert "more; --all lists them" in out
    assert main(["inspect", str(folder), "--all"]) == 1
    assert capsys.readouterr().out.count(": missing\n") > shown


def test_an_index_whose_files_are_not_there(folder, capsys):
    index = {"weight_map": {"lm_head.weight": "model-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["inspect", str(folder)]) == 1
    assert "model-00001.safetensors: not readable" in capsys.readouterr().out


def test_only_headers_are_read(folder, capsys):
    """Of 399 GB that are holes in files, at most 4 GB in each."""
    (folder / "config.json").write_text(json.dumps(published()))
    files = [[]]
    for info in published_tensors(Step35Config.from_dict(published())):
        if sum(other.num_bytes for other in files[-1]) + info.num_bytes > 4e9:
            files.append([])
        files[-1].append(info)
    weight_map = {}
    for number, infos in enumerate(files):
        name = f"model-{number:05d}.safetensors"
        weight_map |= {info.name: name for info in infos}
        text = header(infos)
        with open(folder / name, "wb") as file:
            file.write(text)
            file.truncate(len(text) + sum(info.num_bytes for info in infos))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert main(["inspect", str(folder)]) == 0
    expected = f"weights     {len(files)} files: as the config expects\n"
    assert capsys.readouterr().out.endswith(expected)
