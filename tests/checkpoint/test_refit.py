"""Weights of a live model for another one: the example, and how much memory it takes."""

from __future__ import annotations

import json
import re

import pytest
from support.provider_layouts import EP, PP, TP
from support.reference import random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.tensors.published import published_tensors

pytestmark = [pytest.mark.slow, pytest.mark.megatron]


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (2, "--expert-model-parallel-size 2"),
    ],
)
def test_engine_has_each_step_s_weights(ranks, tmp_path, processes, arguments):
    """Bit for bit what transformers loads of the folder that is saved at the same moment."""
    config = tiny_config()
    folder = write_hf_folder(tmp_path / "hf", config, random_weights(config, 41))
    code = "from support import refit_worker; refit_worker.refit(*arguments)"
    ended = ranks.run(code, processes, folder, tmp_path, *arguments.split())
    assert ended.statuses == [0] * processes, ended.text[-6000:]
    assert ended.text.count("refitted\n") == processes
    assert "step 2: refitted" in ended.text


@pytest.mark.parametrize("layout", [{EP: 2}, {TP: 2, PP: 2, "sequence_parallel": True}])
def test_memory_is_bounded_by_the_largest_tensor(ranks, tmp_path, layout):
    """Of 11 that are as large."""
    config = tiny_config(
        hidden_size=256, moe_intermediate_size=512, moe_num_experts=32, torch_dtype="float32"
    )
    folder = write_hf_folder(tmp_path / "hf", config, {})
    processes = layout.get(EP, 1) * layout.get(TP, 1) * layout.get(PP, 1)
    code = "from support import refit_worker; refit_worker.memory(*arguments)"
    ended = ranks.run(code, processes, folder, json.dumps(layout))
    assert ended.statuses == [0] * processes, ended.text[-6000:]
    found = [json.loads(line) for line in re.findall(r"memory (\{.*?\})", ended.text)]
    wanted = {info.name for info in published_tensors(Step35Config.from_dict(config))}
    for rank in found:
        assert len(rank["names"]) == len(wanted)
        assert set(rank["names"]) == wanted
        assert rank["total"] > 10 * rank["largest"]
        assert rank["peak"] < 5.5 * rank["largest"], rank
    assert len(found) == processes
