"""`step35-patch estimate`: what it prints, and its exit statuses."""

from __future__ import annotations

import json
import re
import sys

import pytest
from support.reference import tiny_config

from step35_patch.cli import main

LAYOUT = "--pp 8 --vpp 3 --cp 8 --ep 8 --etp 1 --gpus 64 --pipeline-layout Ett|(tt|)*21t|mmmL"
RUN = "--seq-length 131072 --micro-batch-size 1 --global-batch-size 32 --optimizer muon"


@pytest.fixture
def estimate(capsys):
    """Exit status, standard output and standard error of the command."""

    def call(*words: str, config: str = "step-3.5-flash") -> tuple[int, str, str]:
        try:
            status = main(["estimate", config, *(part for w in words for part in w.split())])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


def test_json_has_the_promised_keys(estimate):
    status, out, err = estimate(LAYOUT, RUN, "--precision bf16 --recompute full --json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["total_parameters"] == 199_384_301_376 - found["buffer_elements"]
    assert [(rank["pp"], rank["tp"], rank["ep"]) for rank in found["ranks"]] == [
        (stage, 0, 0) for stage in range(8)
    ]
    for rank in found["ranks"]:
        assert set(rank["bytes"]) == {"weights", "gradients", "optimizer", "activations"}
        assert all(isinstance(size, int) and size > 0 for size in rank["bytes"].values())
        assert rank["bytes"]["weights"] == 2 * rank["parameters"]
        assert rank["memory"] == sum(rank["bytes"].values())
    flops = found["flops_per_token"]
    total = flops.pop("total")
    assert isinstance(total, int) and abs(total - sum(flops.values())) < len(flops)
    assert found["ranks"][7]["stages"][2] == {
        "vpp": 2,
        "layers": [45, 46, 47],
        "embedding": True,
        "output": True,
    }


def test_a_person_reads_tables(estimate):
    status, out, _ = estimate(LAYOUT, RUN, "--recompute full --gpu-memory 80")
    assert status == 1  # as in the docs: it does not fit as it is
    lines = out.splitlines()
    assert any(line.split()[:2] == ["7", "14-15,"] for line in lines)
    assert "TP 1, PP 8, VPP 3, CP 8, EP 8, ETP 1, DP 1" in out
    assert "full attention" in out and "does not fit" in lines[-1]
    assert "\x1b" not in out


def test_a_terminal_gets_a_table_of_its_width(estimate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = estimate("--pp 5 --ep 8")
    lines = re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()
    assert status == 0 and any(set(line.strip()) == {"─"} for line in lines)
    assert max(map(len, lines[2:])) <= 80


def test_memory_decides_the_exit_status(estimate):
    one = "--ep 8 --pp 5 --seq-length 8192 --recompute full --use-distributed-optimizer"
    assert estimate(one, "--gpu-memory 300")[0] == 0
    status, out, err = estimate(one, "--gpu-memory 60 --json")
    assert status == 1 and err == "" and json.loads(out)["memory"] > 60 * 2**30


def test_what_cannot_be_laid_out_is_one_line_a_problem(estimate):
    status, out, err = estimate("--pp 7 --gpus 7")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1 and "--pipeline-model-parallel-size: expected a divisor of" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tp 0", "--tp: expected a positive number, found 0"),
        ("--seq-length -5", "--seq-length"),
        ("--recompute uniform:x", "--recompute"),
        ("--search 8", "--gpu-memory"),
        ("--gpu-memory nan", "--gpu-memory: expected a positive number, found 'nan'"),
        ("--search 8 --gpu-memory 80 --pp 2", "--pp: expected none with --search"),
        ("--pp 2 --pipeline-layout Etx|L", "--pipeline-layout"),
        ("--pp 8 --vpp 2 --pipeline-layout Ett|(tt|)*21t|mmmL", "--vpp: expected 3"),
        ("--optimizer adamax", "--optimizer"),
    ],
)
def test_wrong_usage_is_said(estimate, words, said):
    status, out, err = estimate(words)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]


def test_an_unreadable_config_is_said(estimate, tmp_path):
    status, out, err = estimate(config=str(tmp_path / "none.json"))
    assert (status, out) == (2, "") and "none.json" in err
    (tmp_path / "config.json").write_text("{")
    status, out, err = estimate(config=str(tmp_path))
    assert (status, out) == (2, "") and str(tmp_path) in err


def test_layouts_are_searched(estimate, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    status, out, _ = estimate("--search 4 --gpu-memory 1 --json", config=str(tmp_path))
    assert status == 0
    layouts = json.loads(out)["layouts"]
    sizes = {(x["tp"], x["pp"], x["cp"], x["ep"], x["etp"]) for x in layouts}
    virtual = {(*sizes, x["vpp"]) for x in layouts for sizes in [(x["tp"], x["pp"], x["cp"])]}
    assert {(1, 2, 1, 1), (1, 2, 1, 2)} <= virtual
    assert {(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 4, 1, 1, 1), (1, 1, 4, 4, 1)} <= sizes
    status, out, _ = estimate("--search 4 --gpu-memory 1 --limit 3", config=str(tmp_path))
    assert status == 0 and out.splitlines()[-1].split()[0] == "3"
    status, out, _ = estimate("--search 4 --gpu-memory 0.0001", config=str(tmp_path))
    assert status == 1 and out.startswith("no layout fits on 4 GPUs")


@pytest.mark.parametrize(
    ("words", "bytes_of_weight"),
    [
        ("", 12),
        ("--precision fp32", 8),
        ("--use-distributed-optimizer --gpus 4", 3),
        ("--use-distributed-optimizer --use-precision-aware-optimizer --gpus 1", 10),
        ("--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype bf16 "
         "--exp-avg-sq-dtype fp8 --main-params-dtype fp16", 5),
    ],
)  # fmt: skip
def test_the_optimizers_options_count(estimate, tmp_path, words, bytes_of_weight):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    status, out, _ = estimate(words, "--json", config=str(tmp_path))
    [rank] = json.loads(out)["ranks"]
    assert status == 0
    expected = rank["parameters"] * bytes_of_weight
    assert rank["bytes"]["optimizer"] == pytest.approx(expected, rel=1e-3)
