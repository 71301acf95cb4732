"""What only Transformer Engine offers, or does by itself, computes what transformers does.

On its own Python, its kernels stood in for; test_parity.py has the features of the model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from support import te_on_cpu
from support.figures import record
from support.ours import build
from support.parity import LOSS, compare, compare_gradients, total_loss
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine(only=True)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tiny_config()
    weights = random_weights(config, 21)
    return config, weights, write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights)


def _selective(*modules: str) -> dict:
    return {"recompute_granularity": "selective", "recompute_modules": [*modules]}


class Mode(NamedTuple):
    """Options, kernels that have to run for them, and one that has to run more often than without.

    (What of attention is computed again here is torch's.)
    """

    options: dict[str, Any]
    run: tuple[str, ...] = ()
    repeated: str = ""


MODES = {
    "sequential experts": Mode({"moe_grouped_gemm": False}, repeated="generic_gemm"),
    "grouped experts, expanded gate": Mode(
        {"gate_layout": "expanded"}, ("te_general_grouped_gemm",)
    ),
    "fused RoPE": Mode({"apply_rope_fusion": True}, ("fused_rope_forward", "fused_rope_backward")),
    "fused router": Mode(
        {"moe_router_fusion": True},
        ("fused_topk_with_score_function_fwd", "fused_topk_with_score_function_bwd"),
    ),
    "alltoall dispatcher": Mode({"moe_token_dispatcher_type": "alltoall"}),
    "overlapped shared expert": Mode(
        {"moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": True}
    ),
    "everything recomputed": Mode(
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        repeated="rmsnorm_fwd",
    ),
    "attention recomputed": Mode(_selective("core_attn")),
    "activation and norms recomputed": Mode(
        _selective("core_attn", "moe_act", "layernorm"), repeated="rmsnorm_fwd"
    ),
    "MLP and MoE recomputed": Mode(_selective("mlp", "moe"), repeated="te_general_grouped_gemm"),
    "shared expert recomputed": Mode(_selective("shared_experts"), repeated="generic_gemm"),
}


def _calls_of_comparing(case, **options) -> Counter[str]:
    config, weights, folder = case
    te_on_cpu.calls.clear()
    compare(build(folder, **options), Reference(config, weights), seed=21, length=3 * WINDOW)
    return te_on_cpu.calls.copy()


@pytest.fixture(scope="module")
def calls_without(case):
    return _calls_of_comparing(case)


@pytest.mark.parametrize("name", MODES)
def test_mode(case, calls_without, name):
    mode = MODES[name]
    calls = _calls_of_comparing(case, **mode.options)
    assert {"rmsnorm_fwd", "rmsnorm_bwd", "generic_gemm", *mode.run} <= calls.keys()
    if mode.repeated:
        assert calls[mode.repeated] > calls_without[mode.repeated]


def test_fused_permutation(case):
    """Few tokens: each of them is a program of Triton's interpreter."""
    config, weights, folder = case
    model = build(folder, moe_permute_fusion=True)
    compare(model, Reference(config, weights), seed=21, length=WINDOW + 1, batch=1)


@pytest.mark.parametrize("grouped", [True, False])
def test_weight_gradients_are_added_to_those_of_before(case, grouped):
    """--gradient-accumulation-fusion, over two micro-batches."""
    config, weights, folder = case
    model = build(folder, gradient_accumulation_fusion=True, moe_grouped_gemm=grouped)
    fused = []

    def as_megatrons_ddp_does(parameter):
        if parameter.grad_added_to_main_grad:
            fused.append(parameter)
            parameter.grad_added_to_main_grad = False
        else:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(as_megatrons_ddp_does)
    reference = Reference(config, weights)
    for seed in (1, 2):
        input_ids, labels = random_tokens(seed, 2, 2 * WINDOW)
        positions = torch.arange(2 * WINDOW).expand_as(input_ids)
        model(input_ids, positions, None, labels=labels).mean().backward()
        _, loss, mtp_losses = reference.losses(input_ids, labels)
        total_loss(model, loss, mtp_losses).backward()
    assert len(fused) > 2 * 6 * 4
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad
    compare_gradients(model, reference)


@pytest.mark.parametrize("fused_rope", [False, True])
def test_packed_documents_do_not_see_each_other(case, fused_rope):
    """Documents shorter than the window, one longer than it by one, and far longer."""
    from megatron.core.packed_seq_params import PackedSeqParams

    config, weights, folder = case
    model = build(folder, apply_rope_fusion=fused_rope).train()
    lengths = [WINDOW - 3, WINDOW + 1, 4 * WINDOW + 2]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths),
    )  # fmt: skip
    input_ids, labels = random_tokens(22, 1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    losses = model(input_ids, positions, None, labels=labels, packed_seq_params=packed)
    losses.mean().backward()

    reference, total, mtp_totals = Reference(config, weights), 0.0, [0.0, 0.0]
    for document, document_labels in zip(
        input_ids.split(lengths, 1), labels.split(lengths, 1), strict=True
    ):
        length = document.shape[1]
        _, loss, mtp_losses = reference.losses(document, document_labels)
        total += loss * length
        for k, mtp_loss in enumerate(mtp_losses):
            mtp_totals[k] += mtp_loss * (length - 1 - k)
    counts = [sum(lengths) - len(lengths) * (k + 1) for k in range(2)]
    mtp_losses = [total / count for total, count in zip(mtp_totals, counts, strict=True)]
    loss = total / sum(lengths)
    total_loss(model, loss, mtp_losses).backward()
    assert record("loss", abs(losses.mean().item() / loss.item() - 1)) < LOSS
    compare_gradients(model, reference)
