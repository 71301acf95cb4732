"""What a run costs: memory of each rank, operations of a token, bytes sent in a step.

`estimate` puts together what the other modules of this room count for one launch. Nothing is
measured, and no process group is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from step35_patch.config.model import Step35Config
from step35_patch.costs.accounting import flops_by_part
from step35_patch.costs.activations import Kept, stage_bytes
from step35_patch.costs.launch import Launch, LaunchError, Stage, stages
from step35_patch.costs.layout_problems import launch_problems
from step35_patch.costs.messages import Sent, sent_by_rank
from step35_patch.costs.optimizer_state import model_bytes
from step35_patch.costs.schedule import held, passes
from step35_patch.costs.weights import Parameters, Weight, stage_weights


@dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """What one rank of a pipeline stage holds and sends; all ranks of a stage are alike.

    Attributes:
        pp: Its pipeline rank.
        stages: Its virtual stages.
        parameters: Trained elements that are stored on it, replicas included.
        weights: Their bytes.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes, at the peak of the schedule.
        micro_batches: How many of them are in flight then, at most.
        sent: Bytes that it sends in a step.
    """

    pp: int
    stages: tuple[Stage, ...]
    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    activations: int
    micro_batches: float
    sent: Sent

    @property
    def memory(self) -> int:
        """Bytes of everything that it holds."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a launch of a model costs.

    Attributes:
        launch: The launch.
        total_parameters: Trained elements of the model, each counted once.
        router_biases: Elements of the routers' biases, which are buffers and not among them.
        ranks: One for each pipeline rank, in their order.
        flops_per_token: Operations of a token, forward and backward, by part.
    """

    launch: Launch
    total_parameters: int
    router_biases: int
    ranks: tuple[RankEstimate, ...]
    flops_per_token: dict[str, float]

    @property
    def memory(self) -> int:
        """Bytes of the fullest rank."""
        return max(rank.memory for rank in self.ranks)


def estimate(config: Step35Config, launch: Launch) -> Estimate:
    """Count what a launch of a model costs.

    Args:
        config: The model.
        launch: The layout, batch, precision, optimizer and recomputation.

    Raises:
        LaunchError: The model cannot be laid out so, with everything that is in the way.
    """
    if problems := launch_problems(config, launch):
        raise LaunchError(problems)
    found = stages(launch)
    length = launch.seq_length
    return Estimate(
        launch=launch,
        total_parameters=total_parameters(config, launch),
        router_biases=(config.moe_num_experts or 0) * sum(plan.is_moe for plan in config.layers),
        ranks=tuple(_rank(config, launch, found, pp) for pp in _pipeline_ranks(launch)),
        flops_per_token=flops_by_part(
            config,
            tokens=1,
            squared_lengths=length,
            vocab_size=launch.padded_vocab_size,
            mtp_layers=launch.mtp_num_layers,
            window=launch.window,
        ),
    )


def _pipeline_ranks(launch: Launch) -> range:
    return range(launch.pipeline_model_parallel_size)


def whole_model(launch: Launch) -> Launch:
    """The same model on one rank."""
    return Launch(
        num_layers=launch.num_layers,
        padded_vocab_size=launch.padded_vocab_size,
        mtp_num_layers=launch.mtp_num_layers,
        gate_layout=launch.gate_layout,
        window=launch.window,
    )


def total_parameters(config: Step35Config, launch: Launch) -> int:
    """Trained elements of the whole model, as one rank that has all of it stores them."""
    whole = whole_model(launch)
    return Parameters.of(weights_of_rank(config, whole, stages(whole), 0)).total


def weights_of_rank(
    config: Step35Config, launch: Launch, found: list[Stage], pp: int
) -> Iterator[Weight]:
    """The weights of all virtual stages of a pipeline rank."""
    for stage in found:
        if stage.pp == pp:
            yield from stage_weights(config, launch, stage)


def _rank(config: Step35Config, launch: Launch, found: list[Stage], pp: int) -> RankEstimate:
    weights = list(weights_of_rank(config, launch, found, pp))
    own = tuple(stage for stage in found if stage.pp == pp)
    size = model_bytes(weights, launch)
    return RankEstimate(
        pp=pp,
        stages=own,
        parameters=Parameters.of(weights),
        weights=size.weights,
        gradients=size.gradients,
        optimizer=size.optimizer,
        activations=round(peak_activations(config, launch, own)),
        micro_batches=held(launch, pp),
        sent=sent_by_rank(config, launch, found, pp),
    )


def memory_of_ranks(config: Step35Config, launch: Launch) -> list[int]:
    """Bytes that a rank of each pipeline stage holds.

    Raises:
        LaunchError: The layers cannot be divided so.
    """
    found, sizes = stages(launch), []
    for pp in _pipeline_ranks(launch):
        own = tuple(stage for stage in found if stage.pp == pp)
        size = model_bytes(weights_of_rank(config, launch, found, pp), launch)
        sizes.append(sum(size) + round(peak_activations(config, launch, own)))
    return sizes


def peak_activations(config: Step35Config, launch: Launch, own: tuple[Stage, ...]) -> float:
    """Bytes of activations of a rank at the fullest moment of its schedule.

    Args:
        config: The model.
        launch: The layout.
        own: The virtual stages of one pipeline rank, in their order.
    """
    chunks: list[Kept] = [stage_bytes(config, launch, stage) for stage in own]
    alive = peak = 0.0
    for one in passes(launch, own[0].pp):
        kept = chunks[one.chunk]
        if one.is_forward:
            alive += kept.forward
        else:
            peak = max(peak, alive - kept.forward + kept.peak)
            alive -= kept.forward
        peak = max(peak, alive)
    return peak
