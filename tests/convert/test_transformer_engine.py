"""Converted checkpoints into Transformer Engine's modules and out of them, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.converted import GATE_LAYOUTS, SMALL_FILES, assert_same, read
from support.ours import build

from step35_patch.checkpoint import published_tensors_of
from step35_patch.convert import convert_to_hf, convert_to_megatron

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine(only=True)]


@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
@pytest.mark.parametrize("grouped", [True, False])
def test_converted_checkpoint_is_loaded_and_saved(case, tmp_path, gate_layout, grouped):
    from megatron.core import dist_checkpointing

    _, weights, hf = case
    converted, saved = tmp_path / "converted", tmp_path / "saved"
    convert_to_megatron(hf, converted, gate_layout=gate_layout, options=SMALL_FILES)
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    model = build(hf, gate_layout=gate_layout, moe_grouped_gemm=grouped, **bf16)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    for value in [*model.parameters(), *biases]:  # none may keep what it has
        torch.nn.init.constant_(value, float("nan"))
    # Megatron-Core calls unexpected what the model asks for and the checkpoint lacks.
    state, missing, unexpected = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(converted / "release"), strict="return_all"
    )
    assert not missing and not unexpected
    model.load_state_dict(state["model"], strict=True)
    assert_same({name: tensor.clone() for name, tensor in published_tensors_of(model)}, weights)

    saved.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(saved))
    convert_to_hf(saved, tmp_path / "back", hf_dir=hf, options=SMALL_FILES)
    assert_same(read(tmp_path / "back"), weights)
