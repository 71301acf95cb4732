"""Whose Step-3.5 AutoBridge takes: this package's with a config, else its own with a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.bridge_on_cpu import FOLDER, TRANSFORMER_ENGINE
from support.reference import random_weights, tiny_config, write_hf_folder

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="Megatron-Bridge could not be set up: see tools/run.py"
)

START = """
import sys, warnings
from support import bridge_on_cpu
bridge_on_cpu.install()
import step35_patch
from megatron.bridge import AutoBridge

def of_whom():
    bridge = AutoBridge.from_hf_pretrained(sys.argv[1])
    provider = bridge.to_megatron_provider(load_weights=False)
    names = type(bridge._model_bridge).__module__, type(provider).__module__
    return {name.split(".")[0] for name in names}

def warned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whose = of_whom()
    return whose, [str(w.message) for w in caught if "step35_patch" in str(w.message)]
"""


def run(code: str, folder: Path, **variables: str) -> str:
    search = [FOLDER, TRANSFORMER_ENGINE, Path(__file__).parents[1], os.environ.get("PYTHONPATH")]
    variables |= {"PYTHONPATH": os.pathsep.join(str(path) for path in search if path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START + code, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | variables | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(architectures=["Step3p5ForCausalLM"])
    return write_hf_folder(tmp_path_factory.mktemp("hf"), config, random_weights(config, 2))


def test_with_a_config_the_import_of_megatron_bridge_is_enough(folder):
    code = """
assert "step35_patch.bridge" in sys.modules
assert warned() == ({"step35_patch"}, [])
"""
    run(code, folder, STEP35_CONFIG=str(folder))


def test_without_one_megatron_bridges_own_model_comes_with_one_warning(folder):
    code = """
assert "step35_patch.bridge" not in sys.modules
whose, messages = warned()
assert whose == {"megatron"}, whose
assert len(messages) == 1 and "STEP35_CONFIG" in messages[0], messages
assert warned() == ({"megatron"}, [])
# And a config that comes after Megatron-Bridge.
step35_patch.activate(sys.argv[1])
assert warned() == ({"step35_patch"}, [])
"""
    run(code, folder)
