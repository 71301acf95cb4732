"""Operations of a Step-3.5 model: of a batch, of a token, by part and by pipeline stage.

Megatron's own reports assume one head count, full attention everywhere and one output matrix. Its
conventions are kept otherwise: a multiply-add is two operations, backward costs twice the forward,
and causal attention counts the keys that a query sees. Nothing here needs torch.
"""

from __future__ import annotations

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config, Window
from step35_patch.costs.launch import Launch, Stage, layer_plans
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.table import Row, layer_rows


def _visible_keys(plan: LayerPlan, length: float) -> float:
    """Keys that a query sees on average in a sequence of `length` tokens, after Megatron.

    Half of them without a window, as in Megatron's length**2 / 2; with one of W keys the sum of
    min(i, W) over the positions i, so W - W**2 / (2 * length) where the sequence is longer.
    """
    if plan.window_size is None:
        return length / 2
    window = plan.window_size[0] + 1
    return length / 2 if length <= window else window - window**2 / (2 * length)


# What operations are counted for, in the order of a report.
FLOP_PARTS = (
    "attention_projections",
    "full_attention",
    "sliding_attention",
    "dense_ffn",
    "routers",
    "routed_experts",
    "shared_experts",
    "mtp",
    "output",
)


def flops_by_part(
    config: Step35Config,
    *,
    tokens: float,
    squared_lengths: float,
    vocab_size: int,
    mtp_layers: int,
    window: Window = "hf",
) -> dict[str, float]:
    """Operations of the forward and backward pass over a batch, by `FLOP_PARTS`.

    The gate counts with one row a head in both layouts: the others are redundant work. Under "mtp"
    is all that the MTP layers do, their output matrices too; what is recomputed counts once.

    Args:
        config: the model.
        tokens: in the batch.
        squared_lengths: sum of the squared lengths of its sequences. Windows are applied to
            their mean, squared_lengths / tokens.
        vocab_size: rows of an output matrix, padding included.
        mtp_layers: MTP layers that are trained.
        window: convention of the sliding layers, as in `step35_patch.activate`.
    """
    length = squared_lengths / tokens
    total = dict.fromkeys(FLOP_PARTS, 0.0)
    total["output"] = config.hidden_size * vocab_size
    for plan in layer_plans(config, window)[: config.num_hidden_layers + mtp_layers]:
        for part, count in _madds(config, plan, length).items():
            total[part] += count
        if plan.is_mtp:
            total["mtp"] += config.hidden_size * vocab_size
    return {part: 2 * 3 * tokens * count for part, count in total.items()}


def _madds(config: Step35Config, plan: LayerPlan, length: float) -> dict[str, float]:
    """Multiply-adds of a layer's forward pass for a token, without an output matrix."""
    madds = dict.fromkeys(FLOP_PARTS, 0.0)
    scores = "full_attention" if plan.window_size is None else "sliding_attention"
    scored = 2 * plan.num_attention_heads * plan.kv_channels * _visible_keys(plan, length)
    madds["mtp" if plan.is_mtp else scores] += scored
    for row in layer_rows(config, plan, GATE_LAYOUTS[0]):
        part = "mtp" if plan.is_mtp else _part(row)
        if row.is_expert:
            madds[part] += row.num_elements * (config.moe_top_k or 0) // row.shape[0]
        elif len(row.shape) > 1 and not row.is_vocabulary:
            madds[part] += row.num_elements
    return madds


def stage_flops(config: Step35Config, launch: Launch, stage: Stage) -> float:
    """Operations of a token, forward and backward, on all ranks of one stage together."""
    plans = layer_plans(config, launch.window)
    madds = sum(
        sum(_madds(config, plans[index], launch.seq_length).values()) for index in stage.layers
    )
    outputs = (1 + launch.mtp_num_layers) * stage.output
    return 2 * 3 * (madds + outputs * config.hidden_size * launch.padded_vocab_size)


def _part(row: Row) -> str:
    """Of a decoder layer's matrix."""
    if row.is_expert:
        return "routed_experts"
    if ".self_attention." in row.key:
        return "attention_projections"
    if ".shared_experts." in row.key:
        return "shared_experts"
    return "routers" if ".router." in row.key else "dense_ffn"


def training_flops(
    config: Step35Config,
    *,
    tokens: float,
    squared_lengths: float,
    vocab_size: int,
    mtp_layers: int,
    window: Window = "hf",
) -> float:
    """Operations of the forward and backward pass over a batch: the sum of `flops_by_part`."""
    parts = flops_by_part(
        config,
        tokens=tokens,
        squared_lengths=squared_lengths,
        vocab_size=vocab_size,
        mtp_layers=mtp_layers,
        window=window,
    )
    return sum(parts.values())
