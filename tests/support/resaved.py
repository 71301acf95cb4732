"""Folders as transformers' `save_pretrained` writes them, of a tiny multimodal model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.models.step3p7.configuration_step3p7 import (
    Step3p7Config,
    Step3p7TextConfig,
    Step3p7VisionConfig,
)
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7ForConditionalGeneration,
    Step3p7RotaryEmbedding,
)

_VISION = {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14}


def load_by_transformers(
    folder: Path, config: dict[str, Any], dtype: torch.dtype
) -> Step3p7ForConditionalGeneration:
    """The model of a folder in the published layout, with a small vision model beside it."""
    text = {name: value for name, value in config.items() if name != "model_type"}
    whole = Step3p7Config(
        text_config=Step3p7TextConfig(**text), vision_config=Step3p7VisionConfig(**_VISION)
    )
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports that the vision model's weights are missing
    try:
        model = Step3p7ForConditionalGeneration.from_pretrained(
            folder, config=whole, dtype=dtype, attn_implementation="eager"
        )
    finally:
        logger.setLevel(level)
    # Buffers that are in no file: with the stand-in for CUDA they come from "meta" as they may.
    model.model.language_model.rotary_emb = Step3p7RotaryEmbedding(whole.text_config)
    return model


def logits(model: Step3p7ForConditionalGeneration, input_ids: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [b, s, vocabulary]."""
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits
