"""The fused router (common/fused_router): sigmoid scores, top k, their scaling."""

from __future__ import annotations

import torch

from support.te_on_cpu.extension import kernel, plain, refuse


@kernel
def fused_topk_with_score_function_fwd(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function,
    expert_bias, routing_map_format=0, topk_indices=None,
):  # fmt: skip
    """Returns (probabilities, map of the chosen experts, scores), all [tokens, experts]."""
    refuse(f"routing by {score_function}", score_function == "sigmoid")
    refuse("routing by groups", group_topk is None or group_topk <= 0)
    refuse("routing into indices or bits", topk_indices is None and routing_map_format == 0)
    scores = torch.sigmoid(plain(logits, "the router's logits").float())
    ranked = scores if expert_bias is None else scores + expert_bias
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    chosen.scatter_(-1, ranked.topk(topk, -1).indices, True)
    probs = scores * chosen
    if topk > 1:
        probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
    probs = probs * (1.0 if scaling_factor is None else scaling_factor)
    return probs.to(logits.dtype), chosen, scores


@kernel
def fused_topk_with_score_function_bwd(
    routing_map, scores, grad_probs, grad_logits, topk, use_pre_softmax, scaling_factor,
    score_function, use_dense_indices=False, routing_map_format=0,
):  # fmt: skip
    """Writes grad_logits."""
    grad = grad_probs.float() * routing_map * (1.0 if scaling_factor is None else scaling_factor)
    if topk > 1:
        total = (scores * routing_map).sum(-1, keepdim=True) + 1e-20
        weighted = (grad * scores).sum(-1, keepdim=True)
        grad = (grad / total - weighted / total**2) * routing_map
    grad_logits.copy_(grad * scores * (1 - scores))
