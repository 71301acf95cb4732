"""How context parallelism communicates, by layer: `cp_comm_type`, and what does not go with it.

Megatron-Core takes one value for all layers, or a list with one for each decoder layer; its MTP
layers would take the first decoder layers' values, whose attention is another one. No torch is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from step35_patch.config.errors import ranges
from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem

# What Transformer Engine computes windows with.
_WITH_WINDOW = ("a2a", "all_gather")


def cp_comm_types(given: Sequence[str], config: Step35Config) -> list[str]:
    """The value of each layer, MTP layers after the decoder's.

    An MTP layer takes that of the last decoder layer with its kind of attention, or of the last
    one if there is none.

    Args:
        given: one value for all layers, or one for each decoder layer.
        config: the model.

    Raises:
        ValueError: the list is of another length.
    """
    if len(given) == 1:
        return [given[0]] * len(config.layers)
    if len(given) != config.num_hidden_layers:
        raise ValueError(str(_wrong_length(given, config)))
    own = dict(zip(range(len(given)), given, strict=True))
    of_kind = {config.layers[index].attention_type: kind for index, kind in own.items()}
    return [
        own[plan.index] if plan.index in own else of_kind.get(plan.attention_type, given[-1])
        for plan in config.layers
    ]


def _wrong_length(given: Sequence[str], config: Step35Config) -> Problem:
    return Problem(
        "cp_comm_type",
        f"one value, or one for each of num_hidden_layers={config.num_hidden_layers}",
        str(len(given)),
        "the MTP layers take those of decoder layers with their attention",
    )


def cp_comm_type_problems(
    given: Sequence[str], config: Step35Config, tp: int, cp: int
) -> list[Problem]:
    """What Transformer Engine can't compute, empty if there is no such thing.

    Args:
        given: as for `cp_comm_types`.
        config: the model.
        tp: size of tensor parallelism.
        cp: of context parallelism.
    """
    try:
        kinds = cp_comm_types(given, config)
    except ValueError:
        return [_wrong_length(given, config)]
    problems = []
    wrong = [
        plan
        for plan, kind in zip(config.layers, kinds, strict=True)
        if plan.window_size is not None and kind not in _WITH_WINDOW
    ]
    if wrong:
        found = sorted({kinds[plan.index] for plan in wrong})
        problems.append(
            Problem(
                "cp_comm_type",
                "a2a or all_gather in the layers with a sliding window, with which Transformer "
                "Engine knows windows",
                f"{' '.join(found)} in {ranges([plan.index for plan in wrong])}",
                f"give one of the two for all layers, or a list of {config.num_hidden_layers}, in "
                "which full-attention layers may have p2p",
            )
        )
    uneven = [
        plan
        for plan, kind in zip(config.layers, kinds, strict=True)
        if kind == "a2a" and plan.num_query_groups % (tp * cp)
    ]
    if uneven:
        problems.append(
            Problem(
                "cp_comm_type",
                "no a2a in layers whose query groups cannot be divided by tensor x context "
                f"parallel size = {tp} x {cp}",
                f"it in {len(uneven)} of them, the first {uneven[0].index} with "
                f"{uneven[0].num_query_groups}",
                "use all_gather there",
            )
        )
    return problems
