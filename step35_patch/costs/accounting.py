"""What a Step-3.5 model costs: operations of a batch, parameters and activations of a rank.

Megatron's own reports assume one head count, full attention everywhere and one output matrix. Its
conventions are kept otherwise: a multiply-add is two operations, backward costs twice the forward,
and causal attention counts the keys that a query sees. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config, Window
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.table import layer_rows, tensor_table


def _visible_keys(plan: LayerPlan, length: float) -> float:
    """Keys that a query sees on average in a sequence of `length` tokens, after Megatron.

    Half of them without a window, as in Megatron's length**2 / 2; with one of W keys the sum of
    min(i, W) over the positions i, so W - W**2 / (2 * length) where the sequence is longer.
    """
    if plan.window_size is None:
        return length / 2
    window = plan.window_size[0] + 1
    return length / 2 if length <= window else window - window**2 / (2 * length)


def training_flops(
    config: Step35Config,
    *,
    tokens: float,
    squared_lengths: float,
    vocab_size: int,
    mtp_layers: int,
    window: Window = "hf",
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
    length = squared_lengths / tokens
    madds = float(config.hidden_size * vocab_size)
    for plan in config.resolve(window)[: config.num_hidden_layers + mtp_layers]:
        madds += 2 * plan.num_attention_heads * plan.kv_channels * _visible_keys(plan, length)
        for row in layer_rows(config, plan, GATE_LAYOUTS[0]):
            if row.is_vocabulary:
                madds += config.hidden_size * vocab_size
            elif row.is_expert:
                madds += row.num_elements * (config.moe_top_k or 0) // row.shape[0]
            elif len(row.shape) > 1:
                madds += row.num_elements
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
        output_matrices: on the last stage one and one for each MTP layer, wherever those are; 0 on
            the others.
        mtp_layers: MTP layers on this stage.
        vocab_size: rows of the embedding and of an output matrix, padding included.
        gate_layout: "headwise" or "expanded".
        tensor: tensor-parallel size.
        expert: expert-parallel size.
        expert_tensor: tensor-parallel size of the routed experts.
    """
    first_mtp = config.num_hidden_layers
    indices = {*layers, *range(first_mtp, first_mtp + mtp_layers)}
    vocabulary = vocab_size // tensor * config.hidden_size
    dense = vocabulary * ((embedding or mtp_layers > 0) + output_matrices)
    experts = 0
    for row in tensor_table(config, gate_layout):
        if row.is_vocabulary or row.is_fp32:
            continue
        # Outside the layers there is the final norm, which follows the last of the decoder's.
        if (first_mtp - 1 if row.layer is None else row.layer.index) not in indices:
            continue
        own = row.elements_on_rank(tensor=tensor, expert=expert, expert_tensor=expert_tensor)
        if row.is_expert:
            experts += own
        else:
            dense += own
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
        tensor: tensor-parallel size.
        expert_tensor: tensor-parallel size of the routed experts.
        sequence_parallel: whether the layer's and its norms' inputs are divided too.
    """
    hidden = config.hidden_size
    queries = plan.num_attention_heads * plan.kv_channels
    keys = plan.num_query_groups * plan.kv_channels
    # Of an MTP layer besides: of both norms, twice of eh_proj, and of the last norm.
    inputs = (9 if plan.is_mtp else 4) * hidden
    elements = 4 * queries + 3 * keys
    if plan.is_moe:
        # Each rank of an expert-tensor-parallel group gathers all tokens of the group.
        routed = expert_tensor * hidden + 3 * (config.moe_intermediate_size or 0)
        elements += (config.moe_top_k or 0) * routed + 3 * (config.share_expert_dim or 0)
    else:
        elements += 3 * config.intermediate_size
    split = elements / tensor
    return 2 * tokens * (split + inputs / (tensor if sequence_parallel else 1))
