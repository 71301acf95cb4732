"""What a comparison finds, as data: needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from step35_patch.config.layer_plan import LayerPlan


@dataclass(frozen=True, slots=True)
class Part:
    """How far the two sides are apart after one part of the model.

    Attributes:
        name: "embedding", "layer 3", or the published name of an output matrix.
        kind: what a layer is made of ("sliding, MoE"), or what stands before the output matrix.
        difference: the part's own difference, given the reference's input: at each position the
            largest difference over the largest change that the reference's part makes (over its
            largest output, for parts that are not added to what went in); the largest of these.
            What rounding a layer's two additions to its input can make is not counted.
        end_to_end: given its side's own input, the largest difference over the largest output.
        differing: positions whose own difference is over the tolerance, near ties left out.
        near_ties: positions at which the last chosen expert and the next one score so alike that
            rounding can decide between them.
        positions: all of them.
    """

    name: str
    kind: str
    difference: float
    end_to_end: float
    differing: int
    near_ties: int
    positions: int


@dataclass(frozen=True, slots=True)
class LogitsAgreement:
    """How alike the logits of one output matrix are, each side having computed all by itself.

    Attributes:
        name: the published name of the output matrix.
        cosine_min: of the two sides' logits at a position, the smallest.
        cosine_mean: the same, the mean over the positions.
        largest: the largest difference of two logits.
        relative: the same, over the reference's largest logit.
        top1: share of the positions at which both have the largest logit at the same token.
    """

    name: str
    cosine_min: float
    cosine_mean: float
    largest: float
    relative: float
    top1: float


@dataclass(frozen=True, slots=True)
class Report:
    """What `compare` found.

    Attributes:
        parts: all parts, in the order of computation.
        logits: the model's, then each MTP layer's.
        tolerance: the own difference of a part up to which it is said to agree.
        suspects: tensors of the first part that differs, as far as their values are not the same on
            both sides; none if both read the same folder.
    """

    parts: tuple[Part, ...]
    logits: tuple[LogitsAgreement, ...]
    tolerance: float
    suspects: tuple[str, ...]

    @property
    def first_difference(self) -> Part | None:
        """The first part that differs, given the reference's input."""
        return next((part for part in self.parts if part.differing), None)

    @property
    def agrees(self) -> bool:
        """Whether no part differs."""
        return self.first_difference is None


def layer_kind(plan: LayerPlan) -> str:
    """What a layer is made of, as `Part.kind` says it: "sliding, MoE"."""
    attention = "full" if plan.window_size is None else "sliding"
    return f"{attention}, {'MoE' if plan.is_moe else 'dense'}{', MTP' if plan.is_mtp else ''}"
