"""Folders of adapters as PEFT itself loads them, onto transformers' model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel

from support.resaved import load_by_transformers, logits


def adapted_logits(published: Path, adapters: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [b, s, vocabulary], of a published folder's model with a folder's adapters."""
    config = json.loads((published / "config.json").read_text())
    model = load_by_transformers(published, config, torch.float32)
    return logits(PeftModel.from_pretrained(model, adapters), input_ids)
