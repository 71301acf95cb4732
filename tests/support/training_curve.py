"""The same training twice: ours through Megatron-Core's optimizer, the reference's with torch's.

Both start from the same weights and see the same tokens; AdamW, weight decay on all but 1-D
parameters, gradients clipped by their norm, a constant learning rate after a linear warm-up, router
biases fixed. The MTP losses count as Megatron-Core counts them.
"""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.layout_runs import layout_config
from support.ours import build, run
from support.reference import Reference, random_weights, write_hf_folder

# A token whose two best experts score almost alike may go to one expert here and to another there:
# a jump in the loss, which then stays. Many tokens in a batch, weights of the size that training
# starts from, and an epsilon that does not magnify gradients near zero keep such jumps small.
BATCH, LENGTH = 16, 64
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, CLIP = 5e-4, 10, 0.1, 1.0
BETAS, EPS = (0.9, 0.95), 1e-6
WEIGHT_SCALE = 0.25  # of tests/support/reference.py's random weights
MTP_SCALE = 0.1  # Megatron-Core's default mtp_loss_scaling_factor


@dataclass(frozen=True)
class Step:
    """Losses of one iteration, in nats a token: the model's and each MTP layer's."""

    loss: float
    mtp_losses: tuple[float, ...]


def config_and_weights(seed: int = 3) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = layout_config()
    weights = random_weights(config, seed)
    return config, {name: WEIGHT_SCALE * weight for name, weight in weights.items()}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels [BATCH, LENGTH] of an iteration: bytes of Python's documentation."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator).tolist()
    rows = torch.tensor([list(text[start : start + LENGTH + 1]) for start in starts])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def learning_rate(step: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP)


def train_reference(
    config: dict[str, Any], weights: dict[str, torch.Tensor], steps: int
) -> list[Step]:
    """Train transformers' model with torch's AdamW."""
    model = Reference(config, weights)
    trained = [p for p in model.parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        _, loss, mtp_losses = model.losses(*batch(step))
        (loss + MTP_SCALE / len(mtp_losses) * sum(mtp_losses)).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        curve.append(Step(loss.item(), tuple(loss.item() for loss in mtp_losses)))
    return curve


def train_ours(folder: Path, steps: int, **overrides: Any) -> tuple[torch.nn.Module, list[Step]]:
    """Train our model with Megatron-Core's DistributedDataParallel and optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    overrides |= {"mtp_loss_scaling_factor": MTP_SCALE, "moe_router_bias_update_rate": 0.0}
    model = build(folder, **overrides)
    model.train()
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [chunk])
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        MTPLossLoggingHelper.tracker.clear()
        loss = run(chunk, *batch(step)).mean()
        loss.backward()
        # "values" before Megatron-Core 0.19, which counts accepted tokens besides.
        tracker = MTPLossLoggingHelper.tracker
        logged = tracker["loss_values"] if "loss_values" in tracker else tracker["values"]
        mtp_losses = tuple(logged.tolist())
        finalize_model_grads([chunk])
        optimizer.step()
        curve.append(Step(loss.item(), mtp_losses))
    return model, curve


def write_folder(folder: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """The starting point as a folder in the published layout, and its contents."""
    config, weights = config_and_weights()
    return write_hf_folder(folder, config, weights), config, weights


def differences(ours: list[Step], theirs: list[Step]) -> list[float]:
    """The largest relative difference of any loss, by iteration."""
    return [
        max(
            abs(a / b - 1)
            for a, b in zip((x.loss, *x.mtp_losses), (y.loss, *y.mtp_losses), strict=True)
        )
        for x, y in zip(ours, theirs, strict=True)
    ]
