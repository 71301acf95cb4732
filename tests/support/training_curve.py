"""The same training twice: ours through Megatron-Core's optimizer, the reference's with torch's.

Both start from the same weights and see the same tokens. Gradients are clipped by their norm and
router biases fixed; the MTP losses count as Megatron-Core counts them. `ADAM` is whole sequences
with AdamW, `AUTHORS` documents packed into one sequence with Muon, as the authors fine-tune.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from support.layout_runs import layout_config
from support.ours import build, make_optimizer
from support.reference import Reference, random_weights, write_hf_folder
from support.reference_muon import Muon, is_muons

# A token whose two best experts score almost alike may go to one expert here and to another there:
# a jump in the loss, which then stays. Many tokens in a batch, weights of the size that training
# starts from, and an epsilon that does not magnify gradients near zero keep such jumps small.
TOKENS = 1024
WEIGHT_DECAY, CLIP = 0.1, 1.0
BETAS, EPS = (0.9, 0.95), 1e-6
WEIGHT_SCALE = 0.25  # of tests/support/reference.py's random weights
MTP_SCALE = 0.1  # Megatron-Core's default mtp_loss_scaling_factor


@dataclass(frozen=True)
class Recipe:
    """What is trained on, and how.

    Attributes:
        lengths: of the documents of one batch, TOKENS in all.
        packed: whether they are one sequence; else they are as long as each other, and a batch.
        muon: whether matrices are Muon's, and not AdamW's as the rest.
        decay_1d: whether weights of one dimension decay too.
        learning_rate: at its highest.
        warm_up: iterations until then, from `first` on.
        first: the share of it that the first iteration has.
        cosine: over how many iterations it falls to the half; it stays if None.
    """

    lengths: tuple[int, ...]
    packed: bool
    muon: bool
    decay_1d: bool
    learning_rate: float
    warm_up: int
    first: int
    cosine: int | None

    def rate(self, step: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        if self.cosine is None or step < self.warm_up:
            return self.learning_rate * min(1.0, (step + self.first) / self.warm_up)
        turn = math.pi * (step - self.warm_up) / (self.cosine - self.warm_up)
        return self.learning_rate * (0.75 + 0.25 * math.cos(turn))


ADAM = Recipe((64,) * 16, False, False, False, 5e-4, warm_up=10, first=1, cosine=None)
# Documents shorter than the window of 12, on it, and one longer; cosine to half by iteration, from
# 0 as Megatron's scheduler begins.
_DOCUMENTS = (200, 160, 130, 100, 96, 80, 64, 60, 48, 37, 13, 12, 12, 7, 5)
AUTHORS = Recipe(_DOCUMENTS, True, True, True, 1e-3, warm_up=14, first=0, cosine=100)


@dataclass(frozen=True)
class Step:
    """Losses of one iteration, in nats a token: the model's and each MTP layer's."""

    loss: float
    mtp_losses: tuple[float, ...]


def config_and_weights(seed: int = 3) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = layout_config()
    weights = random_weights(config, seed)
    return config, {name: WEIGHT_SCALE * weight for name, weight in weights.items()}


@cache
def _text() -> bytes:
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def documents(recipe: Recipe, step: int) -> list[torch.Tensor]:
    """Those of an iteration, [length + 1] each: bytes of Python's documentation."""
    text, longest = _text(), max(recipe.lengths)
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(
        len(text) - longest - 1, (len(recipe.lengths),), generator=generator
    ).tolist()
    turn = step % len(starts)
    lengths = recipe.lengths[turn:] + recipe.lengths[:turn]
    return [
        torch.tensor(list(text[start : start + length + 1]))
        for start, length in zip(starts, lengths, strict=True)
    ]


def train_reference(
    recipe: Recipe, config: dict[str, Any], weights: dict[str, torch.Tensor], steps: int
) -> list[Step]:
    """Train transformers' model, each document by itself, with torch's AdamW and our Muon."""
    model = Reference(config, weights)
    trained = {name: p for name, p in model.parameters.items() if p.requires_grad}
    muons = [p for name, p in trained.items() if recipe.muon and is_muons(name, p)]
    rest = [p for p in trained.values() if not any(p is muon for muon in muons)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {
            "params": [p for p in rest if p.dim() == 1],
            "weight_decay": WEIGHT_DECAY if recipe.decay_1d else 0.0,
        },
    ]
    optimizers = [torch.optim.AdamW(groups, betas=BETAS, eps=EPS)]
    if recipe.muon:
        optimizers.append(Muon(muons, lr=0.0, weight_decay=WEIGHT_DECAY))
    curve = []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
        curve.append(_reference_losses(model, documents(recipe, step)))
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
    return curve


def _reference_losses(model: Reference, batch: list[torch.Tensor]) -> Step:
    """Means over the tokens of all documents, with their gradients."""
    depths = model.mtp
    counts = [sum(len(d) - 1 - depth for d in batch) for depth in range(depths + 1)]
    sums = [0.0] * (depths + 1)
    for length in sorted({len(document) for document in batch}):
        alike = torch.stack([d for d in batch if len(d) == length])
        _, loss, mtp_losses = model.losses(alike[:, :-1], alike[:, 1:])
        shares = [
            mean * len(alike) * (length - 1 - depth) / counts[depth]
            for depth, mean in enumerate((loss, *mtp_losses))
        ]
        (shares[0] + MTP_SCALE / depths * sum(shares[1:])).backward()
        sums = [total + share.item() for total, share in zip(sums, shares, strict=True)]
    return Step(sums[0], tuple(sums[1:]))


def train_ours(
    recipe: Recipe, folder: Path, steps: int, **overrides: Any
) -> tuple[torch.nn.Module, list[Step]]:
    """Train our model with Megatron-Core's DistributedDataParallel and optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    overrides |= {"mtp_loss_scaling_factor": MTP_SCALE, "moe_router_bias_update_rate": 0.0}
    model = build(folder, **overrides)
    model.train()
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    config = OptimizerConfig(
        optimizer="muon" if recipe.muon else "adam",
        lr=recipe.learning_rate,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP,
        **(_muon_settings(OptimizerConfig) if recipe.muon else {}),
    )
    # Without overrides, weights of one dimension decay as the others.
    optimizer = make_optimizer(
        config, [chunk], **({"config_overrides": {}} if recipe.decay_1d else {})
    )
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        MTPLossLoggingHelper.tracker.clear()
        loss = _our_losses(chunk, documents(recipe, step), packed=recipe.packed).mean()
        loss.backward()
        # "values" before Megatron-Core 0.19, which counts accepted tokens besides.
        tracker = MTPLossLoggingHelper.tracker
        logged = tracker["loss_values"] if "loss_values" in tracker else tracker["values"]
        mtp_losses = tuple(logged.tolist())
        finalize_model_grads([chunk])
        optimizer.step()
        curve.append(Step(loss.item(), mtp_losses))
    return model, curve


def _muon_settings(optimizer_config: Any) -> dict[str, Any]:
    """The authors', in fp32; before Megatron-Core 0.18 one has another name."""
    fields = optimizer_config.__dataclass_fields__
    return {
        "muon_momentum": 0.95,
        "muon_nesterov" if "muon_nesterov" in fields else "muon_use_nesterov": True,
        "muon_coefficient_type": "polar_express",
        "muon_num_ns_steps": 6,
        "muon_scale_mode": "spectral",
        "muon_extra_scale_factor": 0.2,
        "muon_fp32_matmul_prec": "highest",
        "muon_tp_mode": "duplicated",
    }


def _our_losses(model: torch.nn.Module, batch: list[torch.Tensor], *, packed: bool) -> Any:
    """[b, s]: the loss of each token."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if not packed:
        rows = torch.stack(batch)
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, labels=labels)
    lengths = [len(document) - 1 for document in batch]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return model(
        torch.cat([document[:-1] for document in batch])[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        None,
        labels=torch.cat([document[1:] for document in batch])[None],
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        ),
    )


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
