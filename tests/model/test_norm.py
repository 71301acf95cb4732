"""The local norm: transformers' numbers and gradients, and what it keeps for backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7RMSNorm

from step35_patch.model.norm import Step35RMSNorm

EPS = 1e-5


def norms(size: int, dtype: torch.dtype, seed: int) -> tuple[Step35RMSNorm, Step3p7RMSNorm]:
    """Ours and the reference, with the same weight."""
    config = SimpleNamespace(
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        params_dtype=dtype,
        sequence_parallel=False,
    )
    ours, reference = Step35RMSNorm(config, size, EPS), Step3p7RMSNorm(size, EPS)
    weight = 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    ours.weight.data.copy_(weight)
    reference.weight.data.copy_(ours.weight.data)
    return ours, reference.to(dtype)


def heads(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """[s, b, heads, channels] of a wider tensor, as query and key are cut out of linear_qkv's."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (3.0 * torch.randn(2, 11, 4, 40, generator=generator)).to(dtype)
    return mixed.transpose(0, 1)[..., 8:32]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_norm_equals_the_reference(dtype, tolerance, seed):
    ours, reference = norms(24, dtype, seed)
    found, expected = [], []
    for norm, results in ((ours, found), (reference, expected)):
        x = heads(seed, dtype).requires_grad_()
        y = norm(x)
        assert y.dtype == dtype and y.shape == x.shape
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        y.backward(grad.to(dtype))
        results += [y.detach(), x.grad, norm.weight.grad]
    for name, a, b in zip(("output", "gradient", "weight"), found, expected, strict=True):
        off = (a - b).abs().max() / b.abs().max()
        assert off < tolerance, f"{name}: {off}"


def test_norm_keeps_its_input_and_a_number_a_row():
    norm, _ = norms(24, torch.float32, 4)
    x = heads(4, torch.float32).contiguous().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    own = [t for t in kept if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert sum(t.numel() for t in own) == x[..., 0].numel()


def test_second_derivative_is_an_error():
    norm, _ = norms(24, torch.float32, 5)
    x = heads(5, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
