"""Weights in and out, and the loss, under each parallel layout: real processes, gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.provider_layouts import LAYOUTS
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

WORKERS = Path(__file__).parents[1] / "support"

pytestmark = pytest.mark.slow
# With each Megatron-Core; the others run with the newest only.
EVERY_VERSION = ("virtual pipeline", "expanded gate, tp2")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tiny_config()
    weights = random_weights(config, 21)
    folder = write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights)
    tokens = random_tokens(1, 2, 3 * WINDOW)
    _, loss, _ = Reference(config, weights).losses(*tokens)
    return folder, loss.item()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.megatron] if n in EVERY_VERSION else []) for n in LAYOUTS],
)
def test_layout(case, tmp_path, name):
    folder, loss = case
    processes, layout, layers = LAYOUTS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes)]
    command += [str(WORKERS / "distributed_worker.py")]
    command += [str(folder), str(tmp_path / "out"), repr(loss), json.dumps(layout)]
    # torchrun's own default, without its warning.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found = dict(re.findall(r"rank (\d) layers (\[.*?\]) ok", result.stdout))
    assert sorted(found) == [str(rank) for rank in range(processes)], result.stdout[-2000:]
    if layers:
        assert [json.loads(found[str(rank)]) for rank in range(processes)] == layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
