"""Transformer Engine's modules: names, weights and checkpoints. Their forward needs a GPU.

Skipped where Transformer Engine is not installed; it must be built from source (README).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.reference import random_weights, tiny_config, write_hf_folder

from step35_patch.convert import Options, convert_to_megatron


def installed() -> bool:
    # Not by its module, which the stand-in for CUDA hides in this process.
    try:
        return bool(importlib.metadata.version("transformer-engine-torch"))
    except importlib.metadata.PackageNotFoundError:
        return False


WORKERS = Path(__file__).parents[1] / "support"

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not installed(), reason="Transformer Engine is not installed"),
]


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
def test_converted_checkpoint_loads_into_transformer_engines_modules(tmp_path, gate_layout):
    # Its linear layers want sizes that 16 divides.
    config = tiny_config(moe_intermediate_size=32, share_expert_dim=48)
    hf = write_hf_folder(tmp_path / "hf", config, random_weights(config, 4))
    options = Options(file_bytes=50_000)
    convert_to_megatron(hf, tmp_path / "m", gate_layout=gate_layout, options=options)
    command = [sys.executable, str(WORKERS / "transformer_engine_worker.py")]
    result = subprocess.run(
        [*command, str(hf), str(tmp_path / "m"), gate_layout],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = [line for line in result.stdout.splitlines() if not line.startswith("step35_patch")]
    assert len(lines) == 1 and re.fullmatch(r"compared \d+ parameters", lines[0]), lines
