"""Load, train and save under parallel layouts as Megatron trains: real processes, gloo.

What is saved is compared with checkpoints that Megatron-Core saved at the same moments, converted.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from support.converted import assert_same, read, weights_of
from support.provider_layouts import EP, OVERLAP, PP, TP, VPP
from support.reference import tiny_config, write_hf_folder

from step35_patch.convert import convert_to_hf

pytestmark = pytest.mark.slow

TP2, PP2, EP2 = {TP: 2, "sequence_parallel": True}, {PP: 2}, {EP: 2}
LATE = {"overlap_param_gather": True}
# The first chunk's parameters are gathered while the optimizer is still at the others.
EARLY = LATE | {"overlap_param_gather_with_optimizer_step": True}
# Name: (processes, the provider's overrides, the optimizer's options). With the overlap the
# optimizer is the distributed one, over two data-parallel ranks at least.
CASES = {
    "tp2": (2, TP2, {}),
    "pp2": (2, PP2, {}),
    "ep2": (2, EP2, {}),
    "tp2, Muon": (2, TP2, {"optimizer": "muon"}),
    "tp2, overlap": (4, TP2, LATE),
    "pp2, overlap": (4, PP2, LATE),
    "ep2, overlap": (4, EP2, LATE | {"gather_before": True}),
    "virtual pipeline, early overlap": (4, PP2 | {VPP: 3} | OVERLAP, EARLY),
}
# With each Megatron-Core; the others run with the newest only.
EVERY_VERSION = ("tp2", "ep2, overlap")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    config = tiny_config(torch_dtype="bfloat16")
    weights = weights_of(config)
    return weights, write_hf_folder(tmp_path_factory.mktemp("published"), config, weights)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.megatron] if n in EVERY_VERSION else []) for n in CASES],
)
def test_what_is_saved_is_what_megatron_saves(published, ranks, tmp_path, name):
    weights, folder = published
    processes, *options = CASES[name]
    code = "from support import training_worker; training_worker.main(*arguments)"
    ended = ranks.run(code, processes, folder, tmp_path, *map(json.dumps, options))
    assert ended.statuses == [0] * processes, ended.text[-8000:]
    assert len(re.findall(r"rank \d ok", ended.text)) == processes, ended.text[-2000:]
    saved = {path.name: read(path) for path in tmp_path.iterdir()}
    for moment in ("loaded", "trained"):
        converted = tmp_path / f"converted {moment}"
        convert_to_hf(tmp_path / f"megatron {moment}", converted, hf_dir=folder)
        assert_same(saved[moment], read(converted))
    assert_same(saved["loaded"], weights)
    assert_same(saved["after a step at learning rate 0"], weights)
    trained, masters = saved["trained"], saved["masters"]
    assert_same({n: t.to(trained[n].dtype) for n, t in masters.items()}, trained)
    for tensor_name, tensor in masters.items():
        assert tensor.dtype == torch.float32
        of_the_optimizer = not tensor_name.endswith("router_bias")
        assert torch.equal(tensor, trained[tensor_name].float()) != of_the_optimizer, tensor_name
    written = json.loads((tmp_path / "masters" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
