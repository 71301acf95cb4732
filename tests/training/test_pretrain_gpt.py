"""Megatron-LM's own pretrain_gpt.py, unmodified, from a release: every layout trains alike.

The checkouts are named by STEP35_TEST_MEGATRON_LM, separated as in PATH; each is tested with the
Megatron-Core that is in it. test_layouts.py has the same with the wheel alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import layout_runs
from support.layout_runs import (
    LAYOUTS,
    arguments,
    assert_same_training,
    iterations,
    on_engine,
    run,
)
from support.reference import random_weights, write_hf_folder

from step35_patch.convert import convert_to_megatron

VARIABLE = "STEP35_TEST_MEGATRON_LM"
CHECKOUTS = [Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUTS, reason=f"{VARIABLE} names no checkout of Megatron-LM (core_v0.17.1, ...)"
    ),
]

NAMES = ("tp2", "pp2", "vpp", "no decoder layer on the last stage", "ep2", "cp2", "tp2 pp2")
# One less than the embedding has: the tokenizer of 0.17 adds an end-of-document token.
DATA = ["--mock-data", "--vocab-size", "255"]


def run_script(
    checkout: Path, config: Path, *more: str, processes: int = 1, engine: bool = False
) -> str:
    words = [*arguments(iterations=10), *DATA, *more]
    return run(
        config,
        str(checkout / "pretrain_gpt.py"),
        *(on_engine(words) if engine else words),
        processes=processes,
        script=layout_runs.REAL_SCRIPT,
        python_path=(checkout,),
    )


@pytest.fixture(scope="module", params=CHECKOUTS, ids=lambda path: path.name)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain_gpt")
    config, saved = layout_runs.write_config(folder), str(folder / "start")
    run_script(request.param, config, "--save", saved, "--save-interval", "10")
    start = ["--load", saved, "--exit-on-missing-checkpoint"]
    start += ["--finetune", "--no-load-optim", "--no-load-rng"]
    output = run_script(request.param, config, *start)
    assert "step35_patch" in output
    return request.param, config, start, iterations(output)


@pytest.mark.parametrize("name", NAMES)
def test_layout(case, name):
    checkout, config, start, expected = case
    processes, layout = LAYOUTS[name]
    output = run_script(checkout, config, *start, *layout.split(), processes=processes)
    assert_same_training(iterations(output), expected)


def test_conflicting_arguments_end_the_script(case):
    checkout, config, *_ = case
    with pytest.raises(RuntimeError, match=r"--num-layers: expected 6, .* found 7"):
        run_script(checkout, config, "--num-layers", "7")


def test_help_has_the_arguments(case):
    checkout, config, *_ = case
    if "0.17" not in checkout.name:
        pytest.skip("--help of Megatron-Core 0.18 and 0.19 fails in argparse by itself")
    assert "--step35-config PATH" in run_script(checkout, config, "--help")


@pytest.mark.transformer_engine(only=True)
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_on_transformer_engine(tmp_path, checkout):
    """From a converted checkpoint, saved and resumed: as one process on Megatron-Core's layers."""
    config = layout_runs.layout_config()
    write_hf_folder(tmp_path / "hf", config, random_weights(config, 11))
    convert_to_megatron(tmp_path / "hf", tmp_path / "converted")
    path, saved = tmp_path / "hf" / "config.json", str(tmp_path / "saved")
    start = ["--load", str(tmp_path / "converted"), "--exit-on-missing-checkpoint"]
    expected = iterations(run_script(checkout, path, *start))

    processes, layout = LAYOUTS["tp2"]
    how = {"processes": processes, "engine": True}
    save = ["--save", saved, "--save-interval", "5"]
    output = run_script(checkout, path, *start, *layout.split(), *save, **how)
    assert_same_training(iterations(output), expected)
    resume = ["--load", saved, "--ckpt-step", "5", "--exit-on-missing-checkpoint"]
    resumed = iterations(run_script(checkout, path, *layout.split(), *resume, **how))
    # Megatron logs the mean of the first two losses at the second iteration after a start.
    rest = {n: it for n, it in expected.items() if n > 5 and n != 7}
    assert_same_training({n: it for n, it in resumed.items() if n != 7}, rest)
