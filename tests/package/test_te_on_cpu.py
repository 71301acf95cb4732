"""The stand-in for Transformer Engine's kernels: its modules on it compute what plain torch does.

Outputs and all gradients, in fp32; what the stand-in does not know is refused.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from support import te_on_cpu
from support.implementation import ON_TRANSFORMER_ENGINE

pytestmark = pytest.mark.transformer_engine(only=True)

if ON_TRANSFORMER_ENGINE:
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "srelu": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
GATED = {"geglu": "gelu", "reglu": "relu", "qgeglu": "qgelu", "sreglu": "srelu", "swiglu": "silu"}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def agrees(module: torch.nn.Module, reference, *inputs) -> None:
    """Assert that a module's output and the gradients of all its inputs are the reference's."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.data.normal_(0, 0.3)
    out = module(*inputs)
    expected = reference(*inputs)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    differentiable = [x for x in (*inputs, *parameters) if getattr(x, "requires_grad", False)]
    grad = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, differentiable, grad),
        torch.autograd.grad(expected, differentiable, grad),
        strict=True,
    ):
        atol = 2e-5 * (0.1 + wanted.abs().max().item())
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(zero_centered):
    options = {"zero_centered_gamma": zero_centered, "eps": 1e-5, "device": "cuda"}
    rms, layer = te.RMSNorm(32, **options), te.LayerNorm(32, **options)
    agrees(rms, lambda x: F.rms_norm(x, (32,), rms.weight + zero_centered, 1e-5), drawn(6, 2, 32))

    def layer_norm(x):
        return F.layer_norm(x, (32,), layer.weight + zero_centered, layer.bias, 1e-5)

    agrees(layer, layer_norm, drawn(6, 2, 32))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_and_linear(bias, zero_centered):
    options = {"zero_centered_gamma": zero_centered, "eps": 1e-5, "bias": bias, "device": "cuda"}
    module = te.LayerNormLinear(32, 48, normalization="RMSNorm", **options)

    def reference(x):
        normed = F.rms_norm(x, (32,), module.layer_norm_weight + zero_centered, 1e-5)
        return F.linear(normed, module.weight, module.bias if bias else None)

    agrees(module, reference, drawn(6, 2, 32))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED])
def test_activations(activation):
    module = te.LayerNormMLP(
        32, 48, bias=False, normalization="RMSNorm", activation=activation, device="cuda"
    )

    def reference(x):
        hidden = F.linear(F.rms_norm(x, (32,), module.layer_norm_weight, 1e-5), module.fc1_weight)
        if activation in ACTIVATIONS:
            hidden = ACTIVATIONS[activation](hidden)
        else:
            hidden = ACTIVATIONS[GATED[activation]](hidden[..., :48]) * hidden[..., 48:]
        return F.linear(hidden, module.fc2_weight)

    agrees(module, reference, drawn(6, 2, 32))


def test_grouped_linear_with_an_expert_without_tokens():
    module = te.GroupedLinear(3, 32, 48, bias=True, device="cuda")

    def reference(x, splits):
        parts = [
            F.linear(part, getattr(module, f"weight{i}"), getattr(module, f"bias{i}"))
            for i, part in enumerate(x.split(splits))
        ]
        return torch.cat(parts)

    agrees(module, reference, drawn(11, 32), [4, 0, 7])


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("window", [None, (7, 0), (0, 0)])
def test_attention(monkeypatch, window, cudnn):
    te_on_cpu.fused_attention.let_fp32_in()
    monkeypatch.setattr(te_on_cpu.fused_attention, "offered", cudnn)
    te_on_cpu.calls.clear()
    # Transformer Engine keeps its choice of a backend for the arguments that it has seen.
    backend = importlib.import_module(
        "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    )
    monkeypatch.setitem(backend._attention_backends, "backend_selection_requires_update", True)
    module = te.DotProductAttention(
        4, 16, num_gqa_groups=2, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=window,
    )  # fmt: skip
    i, j = torch.arange(24)[:, None], torch.arange(24)
    seen = (j <= i) if window is None else (j <= i) & (i - j <= window[0])

    def reference(q, k, v):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, *(x.repeat_interleave(2, 2) for x in (k, v))))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.permute(2, 0, 1, 3).flatten(2)

    agrees(module, reference, drawn(24, 2, 4, 16), drawn(24, 2, 2, 16), drawn(24, 2, 2, 16))
    assert te_on_cpu.calls["fused_attn_fwd"] == cudnn


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam(weight_decay):
    from transformer_engine.pytorch.optimizers import FusedAdam

    ours = torch.nn.Parameter(torch.randn(50))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 1e-2, "weight_decay": weight_decay, "betas": (0.9, 0.95)}
    optimizers = FusedAdam([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = torch.randn(50)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tensor_format", "shape", "cu_seqlens"),
    [
        ("sbhd", (30, 2, 3, 16), None),
        ("bshd", (2, 30, 3, 16), None),
        ("thd", (30, 3, 16), [0, 7, 30]),
    ],
)
def test_rope(tensor_format, shape, cu_seqlens, interleaved):
    """Against Transformer Engine's own unfused one."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    x, frequencies = drawn(*shape), torch.rand(40, 1, 1, 12)
    options = {
        "tensor_format": tensor_format,
        "interleaved": interleaved,
        "cu_seqlens": cu_seqlens and torch.tensor(cu_seqlens, dtype=torch.int32),
    }
    fused, plain = (
        apply_rotary_pos_emb(x, frequencies, fused=fused, **options) for fused in (True, False)
    )
    torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-5)
    grad = torch.randn_like(fused)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, grad)[0] for y in (fused, plain)), rtol=2e-5, atol=2e-5
    )


def _fp8():
    from transformer_engine.common.recipe import DelayedScaling

    with te.autocast(enabled=True, recipe=DelayedScaling()):
        te.Linear(32, 32, device="cuda")(torch.randn(16, 32))


def _gemm_of_float64():
    x = torch.zeros(2, 2, dtype=torch.float64)
    tex.generic_gemm(
        x, True, x, False, None, None, None, None, None, False, None, False, None, 0, False, False
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: tex.quantize(torch.zeros(2), None),
        lambda: tex.no_such_name,
        lambda: tex.multi_tensor_sgd(1),
        lambda: tex.CommOverlap(),
        _gemm_of_float64,
        _fp8,
    ],
)
def test_what_it_does_not_know_is_refused(call):
    with pytest.raises(RuntimeError, match=r"te_on_cpu|FP8"):  # NotImplementedError is one
        call()
