"""Options of a conversion, also on the command line; the files copied along; the progress bar."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pytest
import torch
from support.converted import SMALL_FILES, assert_same, read, save_dcp, weights_of
from support.reference import tiny_config, write_hf_folder
from support.stored import stored_tensors

from step35_patch import Step35Config
from step35_patch.cli import main
from step35_patch.convert import Options, convert_to_hf, convert_to_megatron
from step35_patch.convert.progress import Progress
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import INDEX
from step35_patch.tensors.qkv import DriftedGateError


def test_drifted_gates_are_refused_or_averaged(case, tmp_path):
    _, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded")
    tensors = stored_tensors(tmp_path / "m" / "release")
    # Layer 1: 6 heads in 2 groups of 16 channels: 3 * 16 rows of q, then 3 * 16 of the gate.
    qkv = tensors["decoder.layers.1.self_attention.linear_qkv.weight"]
    qkv[3 * 16 + 16 + 2] += 0.5  # head 1, its third row
    drifted = save_dcp(tmp_path / "drifted", tensors)
    with pytest.raises(DriftedGateError) as error:
        convert_to_hf(drifted, tmp_path / "back", hf_dir=hf)
    lines = str(error.value).splitlines()
    assert len(lines) == 3  # one layer
    assert "model.layers.1.self_attn.g_proj.weight: by up to 0.5" in lines[1]
    assert "--average-gate" in lines[2]
    assert not (tmp_path / "back").exists()
    convert_to_hf(drifted, tmp_path / "back", hf_dir=hf, average_gate=True)
    found = read(tmp_path / "back")
    name = "model.layers.1.self_attn.g_proj.weight"
    gate = weights[name].clone()
    mean = qkv[3 * 16 + 16 : 3 * 16 + 32].float().mean(dim=0).bfloat16()
    # An element whose rows stayed equal is not rounded.
    gate[1] = torch.where((qkv[66] == weights[name][1]), weights[name][1], mean)
    assert_same(found, weights | {name: gate})
    assert not torch.equal(gate, weights[name])


def test_gate_row_that_became_nan_is_no_equal_row(case, tmp_path):
    """Neither is it dropped because only the first row of a head is taken."""
    _, _, hf = case
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded")
    tensors = stored_tensors(tmp_path / "m" / "release")
    tensors["decoder.layers.1.self_attention.linear_qkv.weight"][3 * 16 + 16 + 2] = float("nan")
    drifted = save_dcp(tmp_path / "drifted", tensors)
    with pytest.raises(DriftedGateError, match=r"model.layers.1.self_attn.g_proj.weight: by up to"):
        convert_to_hf(drifted, tmp_path / "back", hf_dir=hf)


def test_gate_that_is_nan_in_all_rows_has_not_drifted(case, tmp_path):
    config, weights, hf = case
    name = "model.layers.1.self_attn.g_proj.weight"
    broken = weights | {name: torch.full_like(weights[name], float("nan"))}
    write_hf_folder(hf, config, broken)
    on = Options(allow_nonfinite=True, check=True)
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded", options=on)
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=on)
    assert read(tmp_path / "back")[name].isnan().all()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(terminal, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    now = iter(range(0, 1000, 15))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("step35_patch.convert.progress.time.monotonic", lambda: float(next(now)))
    stream = Stream()
    progress = Progress(3_000_000_000, stream)
    progress.add(1_500_000_000)
    progress.say("a tensor has NaN")
    progress.add(1_500_000_000)
    progress.close()
    said = stream.getvalue()
    assert " 50%  1.50 GB of 3.00 GB  100.0 MB/s  0:15 left" in said
    assert "a tensor has NaN\n" in said
    assert ("\r[############            ]" in said) == terminal
    assert said.endswith("\n") and (terminal or "\r" not in said)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_dtype_is_converted_on_request(tmp_path, direction, dtype):
    config = tiny_config(torch_dtype=dtype)
    weights = weights_of(config)
    hf = write_hf_folder(tmp_path / "hf", config, weights)
    half = dataclasses.replace(SMALL_FILES, dtype=torch.float16, check=True)
    first, second = (half, SMALL_FILES) if direction == "to-megatron" else (SMALL_FILES, half)
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded", options=first)
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=second)
    wanted = {n: t if n.endswith("router_bias") else t.half() for n, t in weights.items()}
    assert_same(read(tmp_path / "back"), wanted)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert Step35Config.from_pretrained(tmp_path / "back").torch_dtype == "float16"


def test_checkpoint_of_another_dtype_than_the_config(tmp_path):
    """As of a run with --bf16 of a config in fp32: what is stored is what is written."""
    config = tiny_config(torch_dtype="float32")
    weights = weights_of(config)
    hf = write_hf_folder(tmp_path / "hf", config, weights)
    options = Options(dtype=torch.bfloat16)
    convert_to_megatron(hf, tmp_path / "m", options=options)
    stored = stored_tensors(tmp_path / "m" / "release")
    assert {value.dtype for name, value in stored.items() if "expert_bias" not in name} == {
        torch.bfloat16
    }
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=Options(check=True))
    wanted = {n: t if n.endswith("router_bias") else t.bfloat16() for n, t in weights.items()}
    assert_same(read(tmp_path / "back"), wanted)


def test_other_files_are_copied_along(case, tmp_path):
    """Those of a snapshot in the hub's cache, where files are links."""
    hf = tmp_path / "cache" / "snapshots" / "0123"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    shutil.copytree(case[2], hf)
    (tmp_path / "cache" / "blobs" / "blob").write_text("{}")
    (hf / "tokenizer.json").symlink_to("../../blobs/blob")
    (hf / "tokenizer_2.json").symlink_to("tokenizer.json")
    (hf / "generation_config.json").write_text('{"temperature": 1}')
    (hf / ".hidden").write_text("")
    (hf / "pytorch_model.bin").write_bytes(b"weights of another kind")
    (hf / "original").mkdir()
    convert_to_megatron(hf, tmp_path / "m")
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf)
    copied = {p.name for p in (tmp_path / "back").iterdir() if p.suffix != ".safetensors"}
    assert copied == {"config.json", INDEX, "tokenizer.json", "tokenizer_2.json"} | {
        "generation_config.json"
    }
    assert not (tmp_path / "back" / "tokenizer.json").is_symlink()
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"temperature": 1}'


@pytest.mark.parametrize("place", ["hf", "snapshots/0123"], ids=["a folder", "a snapshot"])
def test_links_to_other_files_are_not_copied(case, tmp_path, place):
    """Whoever made the folder would choose what of this machine is published with the output."""
    hf = tmp_path / "some" / place
    shutil.copytree(case[2], hf)
    secret = tmp_path / "secret"
    secret.write_text("a key")
    (hf / "notes.txt").symlink_to(secret)
    (hf / "more.txt").symlink_to("notes.txt")
    (hf / "loop.txt").symlink_to("loop.txt")
    convert_to_megatron(hf, tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf)
    names = [problem.partition(":")[0] for problem in caught.value.problems]
    assert names == ["more.txt", "notes.txt"]
    assert str(secret) in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_untrained_mtp_layers_are_copied(case, tmp_path):
    """Of a run with --mtp-num-layers 1."""
    _, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m", options=SMALL_FILES)
    tensors = stored_tensors(tmp_path / "m" / "release")
    fewer = {
        n: t
        for n, t in tensors.items()
        if not n.startswith(("mtp.layers.1.", "mtp_output_layers.1."))
    }
    folder = save_dcp(tmp_path / "fewer", fewer)
    with pytest.raises(ValueError, match="mtp_from: the checkpoint lacks 17 tensors"):
        convert_to_hf(folder, tmp_path / "back", hf_dir=hf)
    options = dataclasses.replace(SMALL_FILES, check=True)
    convert_to_hf(folder, tmp_path / "back", hf_dir=hf, mtp_from=hf, options=options)
    assert_same(read(tmp_path / "back"), weights)
    with pytest.raises(ValueError, match="expected None"):
        convert_to_hf(tmp_path / "m", tmp_path / "other", hf_dir=hf, mtp_from=hf)
    # A layer of which a part is there is not an untrained one.
    del fewer["mtp.layers.0.enorm.weight"]
    with pytest.raises(CheckpointError, match=r"mtp.layers.0.enorm.weight: missing"):
        convert_to_hf(save_dcp(tmp_path / "half", fewer), tmp_path / "b", hf_dir=hf, mtp_from=hf)


def test_checkpoint_of_another_config_is_refused(case, tmp_path):
    config, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m")
    other = write_hf_folder(tmp_path / "other", config | {"sliding_window": 9}, weights)
    with pytest.raises(CheckpointError) as error:
        convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=other)
    [problem] = error.value.problems
    assert problem.startswith(
        "sliding_window: 8 in the checkpoint, 9 in the folder's config.json (layers 1-3,5-7); "
    )
    assert problem.endswith("convert to-hf --accept-changed sliding_window")


def test_changes_of_the_config_are_accepted_by_field(case, tmp_path, capsys):
    config, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m")
    other = write_hf_folder(tmp_path / "other", config | {"sliding_window": 9}, weights)
    to_hf = ["convert", "to-hf", str(tmp_path / "m"), str(tmp_path / "back"), "--hf-dir"]
    assert main([*to_hf, str(other), "--accept-changed", "sliding_window", "rope_theta"]) == 1
    assert "rope_theta: expected a field that differs, found none" in capsys.readouterr().err
    assert main([*to_hf, str(other), "--accept-changed", "head_dim"]) == 1
    assert "found head_dim; tensors have other shapes" in capsys.readouterr().err
    assert main([*to_hf, str(other), "--accept-changed", "sliding_window"]) == 0
    assert "accepted: sliding_window: 8 in the checkpoint, 9 in" in capsys.readouterr().err
    assert_same(read(tmp_path / "back"), weights)
    assert Step35Config.from_pretrained(tmp_path / "back").sliding_window == 9


def test_command_line(case, tmp_path, capsys):
    _, weights, hf = case
    out, back = tmp_path / "m", tmp_path / "back"
    to_megatron = ["convert", "to-megatron", str(hf), str(out), "--gate-layout", "expanded"]
    assert main([*to_megatron, "--dry-run", "--max-shard-size", "40KB"]) == 0
    plan = capsys.readouterr().err
    assert "129 tensors" in plan and "nothing is written (dry run)" in plan and "files" in plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    assert main([*to_megatron, "--max-shard-size", "40KB", "--workers", "1", "--check"]) == 0
    said = capsys.readouterr().err
    assert "checked: all 129 tensors are the source's, bit for bit" in said
    assert "GB/s, peak memory" in said.splitlines()[-1]
    assert main(to_megatron) == 1
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert main([*to_megatron, "--overwrite"]) == 0
    assert main(["convert", "to-hf", str(out), str(back), "--hf-dir", str(hf)]) == 0
    assert_same(read(back), weights)
    for wrong in (["--max-shard-size", "5 apples"], ["--max-shard-size", "0"]):
        with pytest.raises(SystemExit) as error:
            main([*to_megatron, *wrong])
        assert error.value.code == 2
    assert main([*to_megatron, "--overwrite", "--workers", "0"]) == 1
    assert "workers: expected at least 1, found 0" in capsys.readouterr().err
