"""`./run verify-gpu` as far as a machine without a GPU goes: what it would run, in a small size."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.figures import record
from support.layout_runs import LAYOUTS
from support.reference import tiny_config

ROOT = Path(__file__).parents[2]


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
    )


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_without_a_gpu_it_says_what_is_left_out_and_measures_nothing():
    dry = run("tools/verify_gpu.py", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    checks = tool("verify_gpu").CHECKS
    for check in checks:
        assert f"{check.name}: {check.what}\n    {check.command}\n    left out: needs" in dry.stdout
    table = ROOT / "benchmarks" / "results" / "gpu.csv"
    before = table.read_bytes() if table.exists() else None
    real = run("tools/verify_gpu.py")
    assert real.returncode == 1
    assert "expected a GPU, found none" in real.stdout
    assert (table.read_bytes() if table.exists() else None) == before


def test_what_a_machine_lacks():
    checks = {check.name: check for check in tool("verify_gpu").CHECKS}
    assert checks["full width"].lacks(1, False) is None
    assert "compiled part" in checks["full width, kernels"].lacks(1, False)
    assert checks["NCCL, 2 GPUs, kernels"].lacks(4, True) is None
    assert checks["NCCL, 4 GPUs"].lacks(2, True) == "4 GPU(s), found 2"
    for gpus in (2, 4):
        assert any(processes == gpus for processes, _ in LAYOUTS.values())


def test_arguments_of_runs_on_gpus():
    words = tool("verify_gpu").layout_words(True, "--context-parallel-size 2")
    assert "gloo" not in words and "--use-cpu-initialization" not in words
    assert "--train-iters" in words and "--bf16" in words
    assert words[words.index("--context-parallel-size") + 1] == "2"
    assert words[words.index("--transformer-impl") + 1] == "transformer_engine"


def test_figures_become_rows():
    verify_gpu = tool("verify_gpu")
    output = 'noise\n{"kind": "full, dense", "ratio": 1.5, "agrees": true}\n'
    assert [
        (row["check"], row["case"], row["figure"], row["value"])
        for row in verify_gpu.rows_of(verify_gpu.CHECKS[0], output)
    ] == [
        ("full width", "full, dense", "ratio", "1.5"),
        ("full width", "full, dense", "agrees", "true"),
    ]


def test_figures_fill_the_cards_column(tmp_path, monkeypatch):
    verify_gpu, card = tool("verify_gpu"), tool("card")
    table = tmp_path / "gpu.csv"
    monkeypatch.setattr(card, "GPU", table)
    assert "not run" in card.render()
    assert "agree (GPU of a kind)" not in card.render()
    monkeypatch.setattr(verify_gpu, "versions", lambda: {"device": "GPU of a kind"})
    output = "".join(
        f'{{"kind": "{kind}", "ratio": 1.5, "agrees": {agrees}}}\n'
        for kind, agrees in (("full, dense", "true"), ("sliding, dense", "false"))
    )
    verify_gpu.write(verify_gpu.rows_of(verify_gpu.CHECKS[0], output), table)
    assert "1 of 2 agree (GPU of a kind)" in card.render()


@pytest.mark.slow
def test_each_kind_of_layer_is_as_near_to_fp32_as_bf16_allows():
    ended = run("tools/full_width.py", "--tiny", "--tokens", "960")
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    found = rows(ended.stdout)
    assert len(found) == 7
    assert {row["kind"].split(",")[0] for row in found} == {"full", "sliding", "MTP"}
    assert all(0.5 < row["ratio"] <= 2 and row["compared"] > 15 for row in found)
    record("ratio", max(row["ratio"] for row in found))


def test_a_window_that_is_off_by_one_is_farther_away():
    full_width = tool("full_width")
    config = full_width.alone(tiny_config(torch_dtype="bfloat16"), 1)
    [right] = full_width.compared(config, 240, "cpu")
    [wrong] = full_width.compared(config, 240, "cpu", window="steptron")
    assert right["agrees"] and not wrong["agrees"], (right, wrong)
    assert wrong["logits"] > 3 * right["logits"]


@pytest.mark.slow
def test_layers_are_timed():
    ended = run("tools/gpu_layers.py", "--tiny", "--rounds", "3")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [row["kind"] for row in rows(ended.stdout)] == [
        *("full dense", "sliding dense", "sliding moe", "full moe clamped"),
    ]
    refused = run("tools/gpu_layers.py")
    assert refused.returncode and "expected a GPU" in refused.stderr
