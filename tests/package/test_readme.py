"""The script in README.md runs as it stands, on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.installed import environment
from support.reference import random_weights, tiny_config, write_hf_folder

ROOT = Path(__file__).parents[2]
MODEL = 'MODEL = "/models/Step-3.5-Flash"\n'


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.megatron
def test_the_script_without_pretrain_gpt_runs_as_it_stands(tmp_path):
    config = tiny_config(torch_dtype="bfloat16")
    weights = random_weights(config, seed=1)
    weights = {
        name: value if name.endswith("router_bias") else value.bfloat16()
        for name, value in weights.items()
    }
    folder = write_hf_folder(tmp_path / "model", config, weights)
    [script] = [block for block in blocks("python") if MODEL in block]
    assert script.count(MODEL) == 1
    path = tmp_path / "script.py"
    path.write_text(script.replace(MODEL, f"MODEL = {str(folder)!r}\n"))
    run = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{ROOT}:{':'.join(sys.path)}"),
        check=False,
    )
    assert run.returncode == 0, run.stderr
    layer, *_, loss = [line for line in run.stdout.splitlines() if line]
    assert layer.startswith("LayerPlan(index=1, ")
    assert loss.startswith("loss ")
    assert 0 < float(loss.removeprefix("loss ")) < 20
    saved = {}
    for file in (tmp_path / "model-saved").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
