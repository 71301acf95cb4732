"""`step35-patch verify`: what it prints and what it refuses."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from support.comparison import HEADS, LENGTH, PARTS, Source, change, change_one_expert
from support.reference import WINDOW, write_hf_folder

from step35_patch.cli import main
from step35_patch.commands import verify as command
from step35_patch.verify.api import compare

# With each Megatron-Core; the others run with the newest only.
every_version = pytest.mark.megatron


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_what_agrees(case, monkeypatch, capsys):
    assert run(monkeypatch, case[2], "--against", "transformers", "--seed", 3) == 0
    out = capsys.readouterr().out
    assert f"6 decoder layers and 2 MTP layers on {WINDOW + 64} random tokens (seed 3)" in out
    assert "weights in memory: at most 0.0212 MB at a time" in out
    rows = [line for line in out.splitlines() if line.split("  ")[0] in PARTS]
    assert len(rows) == len(PARTS) - 1  # lm_head's has the norm's name behind it
    assert all(row.split()[-2:] == ["0", "0"] for row in rows)
    assert "layer 2    sliding, MoE" in out and "layer 7    sliding, dense, MTP" in out
    for head in HEADS:
        assert f"logits of {head}\n  cosine              1.000000000 at least" in out
    assert out.count("top-1 agreement     100.00%") == 3
    assert out.endswith(
        "first layer that differs: none\n"
        "AGREE: no part differs by more than 0.0001 of what it does\n"
    )


def test_the_command_names_what_differs(case, monkeypatch, capsys):
    _, weights, folder = case
    name = "model.layers.3.self_attn.g_proj.weight"
    given = []

    def source(path, config, mtp):
        given.append((path, config.num_hidden_layers, mtp))
        return Source(weights | {name: change(weights[name])})

    monkeypatch.setattr(command, "_checkpoint_source", source)
    assert run(monkeypatch, folder, "--checkpoint", "trained", "--length", LENGTH) == 1
    out = capsys.readouterr().out
    assert given == [("trained", 6, True)]
    assert "ours:                trained" in out
    assert "first layer that differs: layer 3\nDIFFER: layer 3 does, by" in out
    assert f"of {LENGTH} positions\n" in out
    assert out.endswith(f"with other values than HF_DIR's:\n  {name}\n")


@every_version
def test_the_command_reads_a_megatron_checkpoint(case, tmp_path, monkeypatch, capsys):
    _, weights, folder = case
    checkpoint, changed = tmp_path / "megatron", tmp_path / "changed"
    assert main(["convert", "to-megatron", str(folder), str(checkpoint)]) == 0
    assert run(monkeypatch, folder, "--checkpoint", checkpoint, "--length", LENGTH) == 0
    name = "model.layers.5.moe.up_proj.weight"
    weights = weights | {name: change_one_expert(weights[name])}
    write_hf_folder(changed, case[0], weights)
    capsys.readouterr()
    assert run(monkeypatch, changed, "--checkpoint", checkpoint, "--length", LENGTH) == 1
    out = capsys.readouterr().out
    assert "first layer that differs: layer 5" in out and out.endswith(f":\n  {name}\n")


@pytest.mark.parametrize("lacks", ["MTP layers", "equal gate rows"])
def test_the_command_refuses_a_checkpoint_that_lacks(case, monkeypatch, capsys, lacks):
    from step35_patch.storage import megatron_checkpoint as megatron_source
    from step35_patch.tensors.qkv import DriftedGateError

    class Lacking(Source):
        absent = (HEADS[2],) if lacks == "MTP layers" else ()

        def __init__(self, path, config):
            super().__init__(case[1])

        def refuse_drifted_gates(self):
            if lacks == "equal gate rows":
                raise DriftedGateError("drifted")

    monkeypatch.setattr(megatron_source, "MegatronCheckpoint", Lacking)
    arguments = (case[2], "--checkpoint", "trained", "--length", LENGTH)
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    if lacks == "MTP layers":
        assert f"expected 2 MTP layers as in config.json, found no {HEADS[2]}" in error
        assert run(monkeypatch, *arguments, "--no-mtp") == 0
    else:
        assert "drifted" in error


def test_the_command_leaves_the_mtp_layers_out(case, monkeypatch, capsys):
    assert run(monkeypatch, case[2], "--no-mtp", "--length", LENGTH, "--seed", 1) == 0
    out = capsys.readouterr().out
    assert run(monkeypatch, case[2], "--no-mtp", "--length", LENGTH, "--seed", 2) == 0
    assert capsys.readouterr().out.replace("seed 2", "seed 1") != out
    assert "0 MTP layers" in out and "layer 6" not in out and out.count("logits of") == 1


def test_the_command_says_why_nothing_was_compared(case, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, tmp_path) == 1
    assert "config.json" in capsys.readouterr().err
    assert run(monkeypatch, case[2], "--length", WINDOW) == 1
    assert "length: expected more than" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers.models.step3p7", None)
    assert run(monkeypatch, case[2]) == 1
    printed = capsys.readouterr()
    assert 'pip install "transformers>=5.23"' in printed.err and not printed.out
    with pytest.raises(SystemExit):
        run(monkeypatch, case[2], "--against", "vllm")


@every_version
def test_a_process_is_left_as_it_was(case):
    """Twice in a process of its own, which has no groups before or after."""
    program = """
import sys
from step35_patch.commands import verify
assert "torch" not in sys.modules  # `step35-patch --help` has to be quick
import argparse
parser = argparse.ArgumentParser()
verify.add_arguments(parser)
for _ in range(2):
    assert verify.run(parser.parse_args(sys.argv[1:])) == 0
    import torch
    from megatron.core import parallel_state
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
"""
    arguments = [str(case[2]), "--length", str(LENGTH)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AGREE") == 2


def test_the_command_says_how_many_near_ties_there_were(case, tmp_path, monkeypatch, capsys):
    config, weights, _ = case
    router, bias = "model.layers.2.moe.gate.weight", "model.layers.2.moe.router_bias"
    changed = weights[router].clone()
    changed[1] = changed[0]
    weights = weights | {router: changed, bias: torch.zeros(4)}
    folder = write_hf_folder(tmp_path, config, weights)
    ties = sum(part.near_ties for part in compare(folder, length=LENGTH).parts)
    assert ties and run(monkeypatch, folder, "--length", LENGTH) == 0
    assert f"of what it does, {ties} near ties of experts left out\n" in capsys.readouterr().out


@every_version
def test_the_command_prints_no_upstream_warning(case):
    """The real command, as a process: what it imports warns of what a user cannot act upon."""
    arguments = ["verify", str(case[2]), "--length", str(LENGTH)]
    done = subprocess.run(
        [sys.executable, "-m", "step35_patch.cli", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0 and "AGREE" in done.stdout, done.stderr
    assert "Warning" not in done.stderr and "DEPRECATED" not in done.stderr


def test_the_command_leaves_the_warnings_filters_as_they_were(case, monkeypatch):
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    before = list(warnings.filters), list(logger.filters)
    assert run(monkeypatch, case[2], "--length", LENGTH, "--no-mtp") == 0
    assert (list(warnings.filters), list(logger.filters)) == before
