"""FP8 folders to Megatron: what comes out is what a bf16 folder of the same values gives."""

from __future__ import annotations

import dataclasses
import signal

import torch
from support.conversion_runs import KILL, assert_refused, at_change
from support.conversion_world import MANY, finished_files, tree
from support.converted import SMALL_FILES, weights_of
from support.quantized import write_fp8_folder
from support.reference import tiny_config, write_hf_folder
from support.stored import stored_tensors

from step35_patch.convert import convert_to_megatron


def test_option_dequantizes_and_a_resumed_run_knows_it(tmp_path, server):
    config = tiny_config(torch_dtype="bfloat16")
    source, out = tmp_path / "fp8", tmp_path / "out"
    meant = write_fp8_folder(source, config, weights_of(config), (16, 16))
    words = ["convert", "to-megatron", source, out, "--check", "--max-shard-size", MANY]

    refused = server.run(words)
    assert_refused(refused, "1 problem(s)", "quant_method fp8", "--dequantize-fp8")
    assert not out.exists()

    on = [*words, "--dequantize-fp8"]
    # What is left of a run with other options is not gone on with.
    assert server.run([*on, "--without-mtp"], at_change(60, KILL)).status == -signal.SIGKILL
    assert finished_files(out)
    ended = server.run(on, at_change(60, KILL))
    assert ended.status == -signal.SIGKILL
    assert "made of other inputs or options; removed" in ended.text
    finished = finished_files(out)
    assert finished
    ended = server.run(on)
    assert ended.status == 0 and f"{len(finished)} of" in ended.text, ended.text
    assert "tensors are dequantised: quant_method fp8, 8 bits, blocks of 16 x 16" in ended.text

    plain = write_hf_folder(tmp_path / "bf16", config, meant)
    ended = server.run(["convert", "to-megatron", plain, tmp_path / "b", "--max-shard-size", MANY])
    assert ended.status == 0, ended.text
    assert tree(out) == tree(tmp_path / "b")


def test_other_dtype_is_made_of_what_the_config_names(tmp_path):
    """fp32 of the rounded values, so that it is the bf16 folder's model."""
    config = tiny_config(torch_dtype="bfloat16")
    meant = write_fp8_folder(tmp_path / "fp8", config, weights_of(config))
    options = dataclasses.replace(SMALL_FILES, dtype=torch.float32, check=True)
    convert_to_megatron(
        tmp_path / "fp8", tmp_path / "m", dequantize_fp8=True, without_mtp=True, options=options
    )
    stored = stored_tensors(tmp_path / "m" / "release")
    found = stored["decoder.layers.0.mlp.linear_fc2.weight"]
    assert torch.equal(found, meant["model.layers.0.mlp.down_proj.weight"].float())
