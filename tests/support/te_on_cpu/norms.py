"""RMSNorm and LayerNorm, forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from support.te_on_cpu.extension import kernel, no_quantizer, plain, torch_dtype


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()


def _store(value: torch.Tensor, out: torch.Tensor | None, otype: Any) -> torch.Tensor:
    if out is None:
        return value.to(torch_dtype(otype))
    assert out.shape == value.shape, (out.shape, value.shape)
    return out.copy_(value)


@kernel
def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    """Returns (output, None, 1 / rms in fp32 by row)."""
    no_quantizer(quantizer, "rmsnorm_fwd")
    x = plain(input, "rmsnorm_fwd's input").float()
    rsigma = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    out = x * rsigma * _gamma(weight, zero_centered_gamma)
    return [_store(out, ln_out, otype), None, rsigma.flatten()]


@kernel
def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    """Returns (gradient of x, gradient of gamma)."""
    x32, rsigma = x.float(), rsigma.view(*x.shape[:-1], 1)
    normed = x32 * rsigma
    weighted = dz.float() * _gamma(gamma, zero_centered_gamma)
    dx = rsigma * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    dgamma = (dz.float() * normed).flatten(0, -2).sum(0)
    return [dx.to(x.dtype), dgamma.to(gamma.dtype)]


@kernel
def rmsnorm_bwd_add(dz, x, add, rsigma, gamma, sm_margin, zero_centered_gamma):
    """rmsnorm_bwd with `add` added to the gradient of x."""
    dx, dgamma = rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma)
    return [(dx.float() + add.float()).to(x.dtype), dgamma]


@kernel
def layernorm_fwd(
    input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma
):
    """Returns (output, mean, 1 / standard deviation), the latter in fp32 by row."""
    no_quantizer(quantizer, "layernorm_fwd")
    x = plain(input, "layernorm_fwd's input").float()
    mean = x.mean(-1, keepdim=True)
    rsigma = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    out = (x - mean) * rsigma * _gamma(weight, zero_centered_gamma)
    if bias is not None:
        out += bias.float()
    return [_store(out, ln_out, otype), mean.flatten(), rsigma.flatten()]


@kernel
def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
    """Returns the gradients of (x, gamma, beta)."""
    mu, rsigma = (v.view(*x.shape[:-1], 1) for v in (mu, rsigma))
    normed = (x.float() - mu) * rsigma
    weighted = dz.float() * _gamma(gamma, zero_centered_gamma)
    correction = weighted.mean(-1, keepdim=True)
    correction = correction + normed * (weighted * normed).mean(-1, keepdim=True)
    dgamma = (dz.float() * normed).flatten(0, -2).sum(0)
    dbeta = dz.float().flatten(0, -2).sum(0)
    dx = rsigma * (weighted - correction)
    return [dx.to(x.dtype), dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)]
