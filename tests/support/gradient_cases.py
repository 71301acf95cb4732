"""The runs whose gradients, losses and weights must be one process's, and how they are held.

Two cases that are trained on the same have one reference. `tools/gradients.py` writes down the
worst figures of each; tests/training/test_gradients.py holds them to `Case.tolerance`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from support import provider_layouts
from support.layout_runs import layout_config
from support.provider_layouts import CP, EP, OVERLAP, PP, TP, VPP
from support.ranks import Ranks
from support.reference import random_weights, write_hf_folder

SP = {"sequence_parallel": True}
ETP = "expert_tensor_parallel_size"
CUT = "pipeline_model_parallel_layout"

# Name: (processes, provider's overrides)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    **{name: (count, how) for name, (count, how, _) in provider_layouts.LAYOUTS.items()},
    "data parallel": (2, {}),
    "MTP layers on the first stage": (2, {PP: 2, VPP: 2, CUT: "Ettt|ttt|mm|L", **OVERLAP}),
    "tp4": (4, {TP: 4, **SP}),
    "tp2, ep2, etp1": (4, {TP: 2, EP: 2, ETP: 1, **SP}),
    "MTP layers alone on a middle stage": (4, {PP: 4, CUT: "Ettt|ttt|mm|L"}),
    "pp2 and cp2": (4, {PP: 2, CP: 2}),
    "pp2 and dp2": (4, {PP: 2}),
    "cp4": (4, {CP: 4}),
}
LOCAL = {"transformer_impl": "local", "moe_grouped_gemm": False}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "moe", "mlp"],
}


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        layout: one of `LAYOUTS`.
        overrides: further ones of the provider.
        per_token: whether a token counts alike in all micro-batches.
        mask: the tokens that do not count: none, "prompts" of each sample, "all but the last n/8"
            of each, "first half of the samples", or "documents": every other one.
        own_loss: of the logits, as trainers for reinforcement learning have theirs: the model gets
            no labels.
        gathered: whether the model returns the logits of the whole vocabulary.
        samples: each a micro-batch; under data parallelism each rank has its part of them.
        documents: none, "packed", in padded "slots", or "aligned", as long as those slots.
        tokens: a seed of those without documents. Another one where an activation would come within
            2e-6 of its clamp, on whose edge a gradient is there or not by rounding.
        balancing: with both balancing losses and updates of the router's bias.
        embedding_ranks: whether Megatron-Core is told which stages have an embedding.
        decoupled_lr: of embedding and output matrices; none by default.
        optimizer: fields of OptimizerConfig; Adam by default.
        fault: one of `support.rank_faults`, put into all ranks.
        refusal: a pattern of the message with which the run must end.
        tolerance: of each gradient, as a part of its largest value.
    """

    layout: str
    overrides: dict[str, Any] = field(default_factory=dict)
    per_token: bool = False
    mask: str = ""
    own_loss: bool = False
    gathered: bool = False
    samples: int = 4
    documents: str = ""
    tokens: int = 0
    balancing: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    embedding_ranks: bool = True
    decoupled_lr: float | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    refusal: str | None = None
    tolerance: float = 1e-5

    @property
    def processes(self) -> int:
        return LAYOUTS[self.layout][0]

    def spec(self) -> dict[str, Any]:
        """What a rank is told."""
        gathered = {"parallel_output": False} if self.gathered else {}
        return asdict(self) | {"layout": LAYOUTS[self.layout][1] | self.overrides | gathered}

    def reference(self) -> Case:
        """The run with one process that is trained on the same, on Megatron-Core's own layers."""
        return Case(
            "one process",
            overrides=LOCAL,
            per_token=self.per_token,
            mask=self.mask,
            own_loss=self.own_loss,
            samples=self.samples,
            documents="packed" if self.documents == "slots" else self.documents,
            tokens=self.tokens,
            balancing=self.balancing,
            decoupled_lr=self.decoupled_lr,
        )


def _cases() -> dict[str, Case]:
    """By name: every layout with the balancing losses, then what goes wrong in some only."""
    cases = {
        name: Case(name, samples=8 if name == "pp2 and dp2" else 4, balancing=True)
        for name in LAYOUTS
        if name not in ("one process", "cp4")  # which is there for packed documents
    }

    first = "MTP layers on the first stage"
    cases[first] = replace(
        cases[first], refusal="expected the embedding and MTP layers of pipeline rank 0"
    )

    def add(layout: str, what: str, **fields: Any) -> None:
        cases[f"{layout}: {what}"] = Case(layout, **fields)

    sft: dict[str, Any] = {"per_token": True, "mask": "prompts"}
    rl: dict[str, Any] = {"own_loss": True, "gathered": True}
    for layout in (
        "tp2 with sequence parallelism",
        "virtual pipeline",
        "expert parallel",
        "MTP layers alone on a middle stage",
    ):
        add(layout, "prompts masked, per token", **sft, balancing=True)
    add("virtual pipeline", "8 micro-batches, prompts masked", mask="prompts", samples=8)
    add("context parallel", "per token", per_token=True)
    for layout in ("context parallel", "tp2 and cp2"):
        add(layout, "prompts masked, per token", **sft, tokens=500)
    for eighths in (1, 3):
        mask = f"all but the last {eighths}/8"
        add("context parallel", f"{mask} masked, per token", per_token=True, mask=mask)
    add("context parallel", "own loss of the logits", own_loss=True)
    add("context parallel", "own loss, prompts masked, per token", **sft, own_loss=True)
    for layout in ("one process", "tp2 with sequence parallelism"):
        add(layout, "gathered logits, labels", gathered=True)
        add(layout, "gathered logits, own loss", gathered=True, own_loss=True)
    add("tp2 and cp2", "gathered logits, own loss, prompts masked, per token", **sft, **rl)
    sharded = {"distributed_optimizer": True, "overlap": True}
    first_half: dict[str, Any] = {"per_token": True, "mask": "first half of the samples"}
    add("data parallel", "distributed optimizer, overlaps", **sharded, balancing=True)
    add("data parallel", "no token of one rank counts, overlaps", **sharded, **first_half)
    add("expert parallel", "distributed optimizer, no token of one rank", **sharded, **first_half)
    for layout in ("tp2 with sequence parallelism", "context parallel"):
        add(layout, "whole samples masked, per token", **first_half)
    add(
        "context parallel", "own loss, whole samples masked, per token", **first_half, own_loss=True
    )
    add("data parallel", "own loss, no token of one rank", **first_half, own_loss=True)
    some: dict[str, Any] = {"documents": "packed", "mask": "documents", "per_token": True}
    for layout in ("data parallel", "tp2 with sequence parallelism", "pipeline"):
        add(layout, "packed, whole documents masked, per token", **some)
    add("pp2 and dp2", "distributed optimizer, overlaps, per token", **sharded, **sft, samples=8)
    for layout in ("virtual pipeline", "data parallel"):
        add(layout, "packed", documents="packed")
    for layout in ("one process", "tp2 with sequence parallelism", "pipeline"):
        add(layout, "packed in padded slots", documents="slots")
    # Else Megatron-Core takes the mean over the tokens of each rank, of which padding is a part.
    slots: dict[str, Any] = {"per_token": True, "documents": "slots"}
    for layout in ("context parallel", "cp4", "tp2 and cp2", "pp2 and cp2"):
        add(layout, "packed", documents="aligned")
        add(layout, "packed in padded slots, per token", **slots)
    recomputed = {**FULL, "gate_layout": "expanded"}
    add(
        "context parallel",
        "full recomputation, packed, expanded gate",
        overrides=recomputed,
        **slots,
    )
    add("one process", "full recomputation", overrides=FULL, balancing=True)
    add("one process", "selective recomputation", overrides=SELECTIVE, balancing=True)
    add("one process", "full recomputation, packed", overrides=FULL, documents="packed")
    add("virtual pipeline", "full recomputation", overrides=FULL, balancing=True)
    add("context parallel", "selective recomputation", overrides=SELECTIVE, balancing=True)
    add("pipeline", "decoupled learning rate", decoupled_lr=5e-3)
    add(
        "virtual pipeline",
        "TransformerConfig's own way of sending",
        overrides={"overlap_p2p_comm": False, "batch_p2p_comm": True},
        refusal="overlap_p2p_comm",
    )
    add(
        "MTP layers alone on a middle stage",
        "default embedding ranks",
        embedding_ranks=False,
        refusal="get_embedding_ranks",
    )
    return cases


CASES = _cases()
# With each Megatron-Core; the others run with the newest only.
EVERY_VERSION = (
    "tp2 with sequence parallelism",
    "virtual pipeline: 8 micro-batches, prompts masked",
    "virtual pipeline: TransformerConfig's own way of sending",
    "context parallel: prompts masked, per token",
    "context parallel: all but the last 1/8 masked, per token",
    "tp2 with sequence parallelism: gathered logits, labels",
    "tp2 and cp2: gathered logits, own loss, prompts masked, per token",
    "data parallel: distributed optimizer, overlaps",
    "pipeline: decoupled learning rate",
    "pipeline: packed in padded slots",
    "tp2 and cp2: packed",
    "cp4: packed in padded slots, per token",
    "MTP layers on the first stage",
    "MTP layers alone on a middle stage",
    "MTP layers alone on a middle stage: default embedding ranks",
)


def _engine_cases() -> dict[str, Case]:
    """On Transformer Engine, against Megatron-Core's own layers in one process."""
    cases = {
        name: CASES[name]
        for name in (
            "tp2 with sequence parallelism",
            "virtual pipeline",
            "tp2, ep2, etp1",
            "tp2 and pp2",
            "data parallel: distributed optimizer, overlaps",
        )
    }
    by_layer = ["p2p", "a2a", "all_gather", "a2a", "p2p", "a2a"]
    for layout, what, overrides in (
        ("context parallel", "a2a", {"cp_comm_type": "a2a"}),
        ("context parallel", "all_gather", {"cp_comm_type": "all_gather"}),
        ("tp2 and cp2", "cp_comm_type by layer", {"cp_comm_type": by_layer}),
        ("pipeline", "sequential experts", {"moe_grouped_gemm": False}),
        ("expert parallel", "fused weight gradients", {"gradient_accumulation_fusion": True}),
    ):
        cases[f"{layout}: {what}"] = Case(layout, overrides, balancing=True)
    return {name: replace(case, samples=2) for name, case in cases.items()}


ENGINE_CASES = _engine_cases()
ENGINE_EVERY_VERSION = (
    "tp2 with sequence parallelism",
    "context parallel: a2a",
    "pipeline: sequential experts",
    "expert parallel: fused weight gradients",
)
# Of `support.rank_faults`, and the case that each is put into.
ENGINE_FAULTS = {
    "a window wider by one key on the second stage": "pipeline: sequential experts",
    "no clamp of the second rank's experts in one layer": (
        "expert parallel: fused weight gradients"
    ),
    "no RoPE scaling on the second rank in one layer": "context parallel: a2a",
    "the other rank's gate in one layer": "tp2 with sequence parallelism",
    "an input norm of the rank's own tokens in one layer": "tp2 with sequence parallelism",
}


@dataclass(frozen=True)
class Worst:
    """The tensor or loss that is farthest off, and how far, of its largest value."""

    difference: float
    name: str


@dataclass(frozen=True)
class Figures:
    """How far a case is from one process.

    Args:
        gradient, change: the worst tensor's of the first step, and of the weights over all steps.
        log: of the logged losses and gradient norms of all steps.
        norm: how far the first step's norm is from the one of the unique published gradients.
        missing: tensors that no rank has.
    """

    gradient: Worst
    change: Worst
    log: Worst
    norm: float
    missing: list[str]


@dataclass(frozen=True)
class Refused:
    """The run ended with the message that the case allows."""


def write_start(folder: Path) -> Path:
    """The weights that all runs start from, in the published layout."""
    config = layout_config()
    return write_hf_folder(folder, config, random_weights(config, 11))


def hold(
    case: Case,
    hf_dir: Path,
    ranks: Ranks,
    folder: Path,
    shared: Callable[[str, Callable[[Path], None]], Path],
) -> Figures | Refused:
    """Run a case, and its reference if there is none yet, and compare.

    Args:
        case: which.
        hf_dir: of `write_start`.
        ranks: that run it.
        folder: an empty one, for the ranks' findings.
        shared: the folder of a name, filled by a function when it is asked for first.
    """

    def make(made: Path) -> None:
        ended = _run(reference, hf_dir, ranks, "", made / "tensors.pt")
        assert ended is None, ended

    reference = case.reference()
    kept = shared("gradients-" + re.sub(r"\W+", "-", str(_key(reference))), make) / "tensors.pt"
    ended = _run(case, hf_dir, ranks, str(kept), folder)
    if ended is not None:
        assert case.refusal and re.search(case.refusal, ended), ended[-6000:]
        return Refused()
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    assert len(found) == case.processes
    return figures(found, torch.load(kept))


def _key(reference: Case) -> list[Any]:
    default = Case("one process", overrides=LOCAL)
    changed = asdict(reference)
    return [f"{n}={v}" for n, v in changed.items() if v != getattr(default, n)] or ["plain"]


def _run(case: Case, hf_dir: Path, ranks: Ranks, reference: str, out: Path) -> str | None:
    """None, or what the ranks wrote before one failed."""
    code = "from support import gradient_worker; gradient_worker.main(*arguments)"
    ended = ranks.run(code, case.processes, hf_dir, reference, out, json.dumps(case.spec()))
    return ended.text if any(ended.statuses) else None


def figures(found: list[dict[str, Any]], wanted: dict[str, Any]) -> Figures:
    """What all ranks found, against the run with one process."""
    squares = {name: value for rank in found for name, value in rank["squares"].items()}
    by_hand, norm = math.sqrt(sum(squares.values())), found[0]["logs"][0]["grad norm"]
    worst = {
        what: max(
            (Worst(apart, name) for rank in found for name, apart in rank[what].items()),
            key=lambda worst: worst.difference,
        )
        for what in ("gradients", "changes")
    }
    logged = [
        Worst(_relative(value, expected[name]), f"{name}, step {step + 1}")
        for step, expected in enumerate(wanted["logs"])
        for name in expected
        for value in _logged([rank["logs"][step] for rank in found], name)
    ]
    logs = {name for rank in found for name in rank["logs"][0]}
    return Figures(
        worst["gradients"],
        worst["changes"],
        max(logged, key=lambda worst: worst.difference),
        _relative(norm, by_hand),
        sorted(
            (set(wanted["gradients"]) - set(squares)) | (set(wanted["logs"][0]) - logs),
        ),
    )


def _logged(logs: list[dict[str, float]], name: str) -> list[float]:
    """One step's values of what is logged under a name, on the ranks that know it.

    Megatron-Core before 0.19 logs the z loss of each rank's own tokens: the mean of it.
    """
    values = [log[name] for log in logs if name in log]
    return [math.fsum(values) / len(values)] if values and name == "z_loss" else values


def _relative(found: float, wanted: float) -> float:
    apart = abs(found - wanted) / (abs(wanted) or 1.0)
    return apart if apart == apart else math.inf
