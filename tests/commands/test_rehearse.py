"""`step35-patch rehearse`: a launch in a size for this machine, really started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.installed import PUBLISHED

from step35_patch import Step35Config
from step35_patch.costs.launch import stages
from step35_patch.launch.check import check
from step35_patch.launch.command import chosen
from step35_patch.launch.rehearsal import plan
from step35_patch.launch.shell import read_script

SCRIPTS = Path(__file__).parents[1] / "launch" / "scripts"


def planned(script: str, arguments: list[str], processes: int):
    config = Step35Config.from_pretrained(PUBLISHED)
    calls, _ = read_script(SCRIPTS / script, arguments)
    report = check(config, chosen(calls, script, None))
    assert report.problems == []
    return config, report, plan(config, report.launch, report.command.arguments, processes)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("arrays.sh", []),
        ("slurm_container.sh", []),
        ("strings.sh", ["/out", "/data"]),
        ("entrypoint.sh", ["--nodes", "5"]),
    ],
)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_plan_is_a_launch_without_problems(tmp_path, script, arguments, processes):
    """Of layers of the same kinds, in their order, and with all that a user chose."""
    config, report, small = planned(script, arguments, processes)
    assert 1 <= small.processes <= processes
    of_launch = [index for stage in stages(report.launch) for index in stage.decoder_layers]
    kept = [index for stage in small.stages for index in stage.decoder_layers]
    assert kept == sorted(kept) and set(kept) <= set(of_launch)
    shrunk = Step35Config.from_dict(small.config)
    for plan_, index in zip(shrunk.layers, kept, strict=False):
        before = config.layers[index]
        assert (plan_.attention_type, plan_.is_moe) == (before.attention_type, before.is_moe)
        assert (plan_.swiglu_limit is None) == (before.swiglu_limit is None)
    assert shrunk.num_nextn_predict_layers == 2
    if processes == 4:
        kinds = {(layer.attention_type, layer.is_moe) for layer in shrunk.layers[: len(kept)]}
        assert len(kinds) >= 3
    asked = {word for word in report.command.arguments if word.startswith("--muon")}
    assert asked <= set(small.arguments)


@pytest.mark.slow
def test_a_launch_script_starts_saves_and_resumes(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(PUBLISHED.read_text())
    done = rehearse(
        tmp_path,
        "--processes",
        "2",
        "--config",
        str(config),
        "--keep",
        "kept",
        "--",
        str(SCRIPTS / "arrays.sh"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "this launch script starts"
    losses = [float(loss) for loss in re.findall(r"iteration \d  loss (\S+)", done.stdout)]
    assert len(losses) == 5
    assert all(5 < loss < 6 for loss in losses)  # of 256 tokens, hardly trained
    assert "pipeline_model_parallel_size: 8 -> 2" in done.stdout
    assert (
        json.loads((tmp_path / "kept" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    )
    assert list((tmp_path / "kept" / "checkpoint").glob("iter_*"))


@pytest.mark.slow
def test_the_first_error_is_shown_with_its_argument(tmp_path):
    """Of what only a start shows: a module that is not there; and of what is known before."""
    config = str(PUBLISHED)
    (tmp_path / "train.py").write_text(
        "import sys\nraise RuntimeError('no good value for seq_length')\n"
    )
    words = ["torchrun", "--nproc-per-node", "1", "train.py", "--seq-length", "64"]
    words += ["--micro-batch-size", "1", "--lr", "1e-3", "--train-iters", "2"]
    words += ["--transformer-impl", "local", "--tokenizer-type", "NullTokenizer"]
    words += ["--vocab-size", "128896", "--mock-data"]
    given = ["STEP35_PATCH=1", f"STEP35_CONFIG={config}", *words]
    done = rehearse(tmp_path, "--", *given)
    assert done.returncode == 1, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == (
        "this launch does not start (about --seq-length): RuntimeError: no good value for "
        "seq_length"
    )
    assert rehearse(tmp_path, "--", "ls", "-l").returncode == 2


def rehearse(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "step35_patch.cli", "rehearse", *words],
        cwd=folder,
        env={n: v for n, v in os.environ.items() if not n.startswith("STEP35_")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
