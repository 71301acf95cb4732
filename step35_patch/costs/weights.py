"""Which weights each stage of a launch has, and how many elements of them a rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.costs.launch import Launch, Stage
from step35_patch.tensors.table import layer_rows


class Kind(Enum):
    """What an optimizer and data parallelism make of a weight."""

    VOCABULARY = auto()  # embedding and output matrices
    MATRIX = auto()
    VECTOR = auto()  # the norms'
    EXPERT = auto()  # matrices of routed experts


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight on one rank, or the equal ones of all routed experts that it holds.

    Attributes:
        kind: What it is.
        elements: Of each of them, on this rank.
        count: How many of them.
    """

    kind: Kind
    elements: int
    count: int = 1

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.elements * self.count


@dataclass(frozen=True)
class Parameters:
    """Trained elements of a rank: those shared out by tensor parallelism, and the experts'."""

    dense: int = 0
    expert: int = 0

    @classmethod
    def of(cls, weights: Iterable[Weight]) -> Parameters:
        """The sums of some weights."""
        dense = expert = 0
        for weight in weights:
            if weight.kind is Kind.EXPERT:
                expert += weight.total
            else:
                dense += weight.total
        return cls(dense, expert)

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.expert + other.expert)


def stage_weights(config: Step35Config, launch: Launch, stage: Stage) -> Iterator[Weight]:
    """The weights of one rank of a stage, as Megatron-Core builds them.

    What is whole on every tensor-parallel rank (norms, routers) is so here. Routers' biases are no
    parameters, but buffers.
    """
    rows = launch.padded_vocab_size // launch.tensor_model_parallel_size
    if stage.embedding or stage.mtp_layers:  # MTP layers embed the next tokens themselves
        yield Weight(Kind.VOCABULARY, rows * config.hidden_size)
    for index in stage.layers:
        yield from _layer_weights(
            config,
            config.layers[index],
            launch.gate_layout,
            tensor=launch.tensor_model_parallel_size,
            expert=launch.expert_model_parallel_size,
            expert_tensor=launch.expert_tensor_parallel_size,
        )
    # The final norm, of `has_final_layernorm_in_this_stage`.
    with_norm = stage.output
    if launch.mtp_num_layers:
        with_norm = launch.num_layers - 1 in stage.decoder_layers
    if with_norm:
        yield Weight(Kind.VECTOR, config.hidden_size)
    if stage.output:
        yield Weight(Kind.VOCABULARY, rows * config.hidden_size, 1 + launch.mtp_num_layers)


@lru_cache(maxsize=4096)  # a search asks for the same ones again and again
def _layer_weights(
    config: Step35Config, plan: LayerPlan, gate_layout: str, **parallel: int
) -> tuple[Weight, ...]:
    """Those of one layer, without an MTP layer's output matrix."""
    found = []
    for row in layer_rows(config, plan, gate_layout):
        if row.is_fp32 or row.is_vocabulary:
            continue
        elements = row.elements_on_rank(**parallel)
        if row.is_expert:
            count = row.shape[0] // parallel["expert"]
            found.append(Weight(Kind.EXPERT, elements // count, count))
        else:
            found.append(Weight(Kind.VECTOR if len(row.shape) == 1 else Kind.MATRIX, elements))
    return tuple(found)
