"""Activations: name(input, quantizer) and dname(grad, fwd_input, quantizer), computed in fp32.

The gated ones apply the activation to the first half of the last dimension and multiply it by the
second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from support.te_on_cpu.extension import kernel, no_quantizer, plain

_ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "srelu": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
_GATES = {"glu": torch.sigmoid, "swiglu": F.silu} | {
    name.replace("lu", "glu"): _ACTIVATIONS[name] for name in ("relu", "srelu", "gelu", "qgelu")
}


def _gated(act: Callable, x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return act(first) * second


def _clamped_swiglu(x, limit=7.0, alpha=1.702, glu_linear_offset=1.0):
    """As in GPT-OSS: both halves are clamped before the activation."""
    first, second = x.chunk(2, -1)
    first, second = first.clamp(max=limit), second.clamp(-limit, limit)
    return first * torch.sigmoid(alpha * first) * (second + glu_linear_offset)


def _register_activation(name: str, compute: Callable) -> None:
    def forward(input, quantizer, *args, **kwargs):
        no_quantizer(quantizer, name)
        return compute(plain(input, name).float(), *args, **kwargs).to(input.dtype)

    def backward(grad, fwd_input, quantizer, *args, **kwargs):
        no_quantizer(quantizer, name)
        with torch.enable_grad():
            x = plain(fwd_input, name).detach().float().requires_grad_()
            (dx,) = torch.autograd.grad(compute(x, *args, **kwargs), x, grad.float())
        return dx.to(fwd_input.dtype)

    forward.__name__ = name
    backward.__name__ = "clamped_dswiglu" if name == "clamped_swiglu" else f"d{name}"
    kernel(forward)
    kernel(backward)


for _name, _act in _ACTIVATIONS.items():
    _register_activation(_name, _act)
for _name, _act in _GATES.items():
    _register_activation(_name, functools.partial(_gated, _act))
_register_activation("clamped_swiglu", _clamped_swiglu)
