"""`tools/megatron_changes.py` sees what a new Megatron-Core has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "megatron_changes.py"

MODEL = "megatron/core/models/gpt/gpt_model.py"
LOSS = "megatron/core/transformer/multi_token_prediction.py"
LAYER = "megatron/core/transformer/transformer_layer.py"
CONFIG = "megatron/core/transformer/transformer_config.py"
OLD = {
    MODEL: "from megatron.core.transformer.multi_token_prediction import process_mtp_loss\n",
    LOSS: "def process_mtp_loss(labels, *, group=None): pass\n",
    LAYER: "class TransformerLayer:\n    def __init__(self, config): pass\n"
    "    def forward(self, x): pass\n    def unused(self, x): pass\n",
    CONFIG: "class TransformerConfig:\n    old: int = 1\n    kept: int = 1\n",
}
NEW = {
    MODEL: OLD[MODEL],
    LOSS: "if True:\n    def process_mtp_loss(labels, input_ids=None, *, group): pass\n",
    LAYER: "class TransformerLayer:\n    def __init__(self, config, name=None): pass\n"
    "    def forward(self, x): pass\n    def unused(self): pass\n",
    CONFIG: "class TransformerConfig:\n    new: bool = False\n    kept: int = 2\n",
}


@pytest.fixture
def folders(tmp_path):
    for name, files in {"old": OLD, "new": NEW}.items():
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
    return tmp_path / "old", tmp_path / "new"


def run(old: Path, new: Path) -> list[str]:
    command = [sys.executable, SCRIPT, old, new]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_changes_are_seen_and_what_is_not_used_is_not(folders):
    lines = run(*folders)
    assert lines == [
        "== wrapped",
        "changed  process_mtp_loss: -group=None, +input_ids=None, +group",
        "== imported",
        "changed  TransformerLayer.__init__: +name=None",
        "== fields of TransformerConfig",
        "changed  kept: -int = 1, +int = 2",
        "new      new: bool = False",
        "gone     old",
    ]


def test_a_wrapped_function_that_is_gone_is_seen(folders):
    old, new = folders
    (new / MODEL).write_text("")
    assert "gone     process_mtp_loss" in run(old, new)


def test_everything_that_the_package_uses_is_found_in_the_installed_megatron(tmp_path):
    import megatron.core

    site = Path(megatron.core.__file__).parents[2]
    lines = run(tmp_path, site)
    assert run(site, site) == ["== wrapped", "== imported", "== fields of TransformerConfig"]
    found = {line.split()[1].rstrip(":") for line in lines if line.startswith("new ")}
    assert {"GPTModel.__init__", "process_mtp_loss", "parse_args", "SelfAttention"} <= found
    assert {"TransformerLayer.__init__", "num_layers", "tensor_model_parallel_size"} <= found
