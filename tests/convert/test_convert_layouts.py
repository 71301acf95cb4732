"""A converted checkpoint in Megatron-Core under each parallel layout, and back: real processes.

Each layout loads it, gives the reference's logits, saves it sharded in its own way, and what
it saved converts back to the published tensors, bit for bit.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from support.provider_layouts import EP, LAYOUTS, TP
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

from step35_patch.convert import Options, convert_to_hf, convert_to_megatron

pytestmark = pytest.mark.slow
# With each Megatron-Core; the others run with the newest only.
EVERY_VERSION = ("virtual pipeline", "expert parallel")

# A checkpoint has no trace of the sizes below, so that one of each kind is enough.
CASES = {
    name: LAYOUTS[name][:2]
    for name in (
        "tp2 with sequence parallelism",
        "pipeline",
        "virtual pipeline",
        "expert parallel",
        "expanded gate, tp2",
        "tp2 and pp2",
    )
} | {
    "one process": (1, {}),
    "tp2 ep2 etp1": (
        4,
        {TP: 2, EP: 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True},
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The published folder, its weights, a converted checkpoint for each gate layout, logits."""
    top = tmp_path_factory.mktemp("convert")
    config = tiny_config()
    weights = random_weights(config, 21)
    folder = write_hf_folder(top / "hf", config, weights)
    for gate_layout in ("headwise", "expanded"):
        options = Options(file_bytes=50_000)
        convert_to_megatron(folder, top / gate_layout, gate_layout=gate_layout, options=options)
    tokens, _ = random_tokens(1, 2, 3 * WINDOW)
    with torch.no_grad():
        reference = Reference(config, weights)
        logits = reference.logits(reference.hidden_states(tokens))
    torch.save(logits, top / "logits.pt")
    return top, weights


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.megatron] if n in EVERY_VERSION else []) for n in CASES],
)
def test_layout(case, ranks, tmp_path, name):
    top, weights = case
    processes, layout = CASES[name]
    checkpoint = top / layout.get("gate_layout", "headwise")
    paths = top / "hf", checkpoint, top / "logits.pt", tmp_path / "saved"
    code = "from support import convert_worker; convert_worker.main(*arguments)"
    ended = ranks.run(code, processes, *paths, json.dumps(layout))
    assert ended.statuses == [0] * processes, ended.text[-8000:]
    assert len(re.findall(r"rank \d ok", ended.text)) == processes, ended.text[-2000:]
    convert_to_hf(tmp_path / "saved", tmp_path / "back", hf_dir=top / "hf")
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(weights)
    assert [name for name, value in weights.items() if not torch.equal(found[name], value)] == []
