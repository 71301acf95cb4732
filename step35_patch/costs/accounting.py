"""What a Step-3.5 model costs: operations of a batch, parameters and activations of a rank.

Megatron's own reports assume one head count, full attention everywhere and one output matrix. Its
conventions are kept otherwise: a multiply-add is two operations, backward costs twice the forward,
and causal attention counts the keys that a query sees. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config


def _visible_keys(plan: LayerPlan, length: float) -> float:
    """Keys that a query sees on average in a sequence of `length` tokens, after Megatron.

    Half of them without a window, as in Megatron's length**2 / 2; with one of W keys the sum of
    min(i, W) over the positions i, so W - W**2 / (2 * length) where the sequence is longer.
    """
    if plan.window_size is None:
        return length / 2
    window = plan.window_size[0] + 1
    return length / 2 if length <= window else window - window**2 / (2 * length)


def _attention_weights(plan: LayerPlan, config: Step35Config, gate_rows_per_head: int) -> int:
    """Elements of linear_qkv and linear_proj of one layer."""
    rows = (2 * plan.num_attention_heads + 2 * plan.num_query_groups) * plan.kv_channels
    if config.use_head_wise_attn_gate:
        rows += plan.num_attention_heads * gate_rows_per_head
    return rows * config.hidden_size


def training_flops(
    config: Step35Config,
    *,
    tokens: int,
    squared_lengths: float,
    vocab_size: int,
    mtp_layers: int,
    window: str = "hf",
) -> float:
    """Operations of the forward and backward pass over a batch.

    The gate counts with one row a head in both layouts: the others are redundant work.

    Args:
        config: the model.
        tokens: in the batch.
        squared_lengths: sum of the squared lengths of its sequences. Windows are applied to
            their mean, squared_lengths / tokens.
        vocab_size: rows of an output matrix, padding included.
        mtp_layers: MTP layers that are trained.
        window: convention of the sliding layers, as in `step35_patch.activate`.
    """
    hidden = config.hidden_size
    length = squared_lengths / tokens
    madds = hidden * vocab_size
    for plan in config.resolve(window)[: config.num_hidden_layers + mtp_layers]:
        madds += _attention_weights(plan, config, gate_rows_per_head=1)
        madds += 2 * plan.num_attention_heads * plan.kv_channels * _visible_keys(plan, length)
        if plan.is_moe:
            routed = config.moe_top_k * config.moe_intermediate_size
            madds += hidden * config.moe_num_experts
            madds += 3 * hidden * (routed + config.share_expert_dim)
        else:
            madds += 3 * hidden * config.intermediate_size
        if plan.is_mtp:
            madds += 2 * hidden**2 + hidden * vocab_size
    return 2 * 3 * tokens * madds


@dataclass(frozen=True)
class Parameters:
    """Trained elements of a rank: those shared out by tensor parallelism, and the experts'."""

    dense: int = 0
    expert: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.expert + other.expert)


def stage_parameters(
    config: Step35Config,
    layers: Iterable[int],
    *,
    embedding: bool,
    output_matrices: int,
    mtp_layers: int,
    vocab_size: int,
    gate_layout: str = "headwise",
    tensor: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
) -> Parameters:
    """The parameters of one rank of a pipeline stage. Router biases are no parameters, but buffers.

    Args:
        config: the model.
        layers: absolute indices of the stage's decoder layers.
        embedding: whether it is the first stage. One with MTP layers has a copy of the embedding.
        output_matrices: on the last stage one and one for each MTP layer, wherever those are; else 0.
        mtp_layers: MTP layers on this stage.
        vocab_size: rows of the embedding and of an output matrix, padding included.
        gate_layout: "headwise" or "expanded".
        tensor, expert, expert_tensor: parallel sizes.
    """
    hidden, plans = config.hidden_size, config.layers
    rows = config.head_dim if gate_layout == "expanded" else 1
    first_mtp = config.num_hidden_layers
    indices = [*layers, *range(first_mtp, first_mtp + mtp_layers)]
    vocabulary = vocab_size // tensor * hidden
    dense = vocabulary * ((embedding or mtp_layers > 0) + output_matrices)
    experts = 0
    for plan in (plans[index] for index in indices):
        dense += _attention_weights(plan, config, rows) // tensor
        dense += 2 * hidden + 2 * plan.kv_channels  # norms: whole on every rank
        if plan.is_moe:
            dense += hidden * config.moe_num_experts
            dense += 3 * hidden * config.share_expert_dim // tensor
            own = config.moe_num_experts // expert
            experts += own * 3 * hidden * config.moe_intermediate_size // expert_tensor
        else:
            dense += 3 * hidden * config.intermediate_size // tensor
        if plan.is_mtp:
            dense += 3 * hidden + 2 * hidden**2 // tensor
    if config.num_hidden_layers - 1 in indices:
        dense += hidden  # the final norm
    return Parameters(dense, experts)


def layer_activation_bytes(
    config: Step35Config,
    plan: LayerPlan,
    tokens: int,
    *,
    tensor: int = 1,
    expert_tensor: int = 1,
    sequence_parallel: bool = True,
) -> float:
    """Bytes in bf16 that a rank keeps of one layer for its backward, without recomputation.

    In the manner of table 2 of Korthikanti et al. 2022 (arXiv 2205.05198) with the layer's own
    shapes: inputs of norms and matrix products, q and k before and after their norms, the
    attention's output before and after its gate, SwiGLU's input and output. Attention keeps no
    scores, as with fused kernels. Routed tokens are taken to be even over the ranks.

    Args:
        config: the model.
        plan: the layer.
        tokens: of a micro-batch, on one context-parallel rank.
        tensor, expert_tensor: parallel sizes.
        sequence_parallel: whether the layer's and its norms' inputs are divided, too.
    """
    hidden = config.hidden_size
    queries = plan.num_attention_heads * plan.kv_channels
    keys = plan.num_query_groups * plan.kv_channels
    # Of an MTP layer besides: of both norms, twice of eh_proj, and of the last norm.
    inputs = (9 if plan.is_mtp else 4) * hidden
    elements = 4 * queries + 3 * keys
    if plan.is_moe:
        # Each rank of an expert-tensor-parallel group gathers all tokens of the group.
        routed = expert_tensor * hidden + 3 * config.moe_intermediate_size
        elements += config.moe_top_k * routed + 3 * config.share_expert_dim
    else:
        elements += 3 * config.intermediate_size
    split = elements / tensor
    return 2 * tokens * (split + inputs / (tensor if sequence_parallel else 1))
