"""What optimizers and gradient clipping call (common/multi_tensor)."""

from __future__ import annotations

import torch

from support.te_on_cpu.extension import kernel


def _norms(tensors: list[torch.Tensor], factor: float, per_tensor: bool | None, flag) -> tuple:
    norms = torch.stack([(t.float() * factor).norm() for t in tensors])
    if not norms.isfinite().all():
        flag.fill_(1)
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


@kernel
def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=None):
    """Returns (norm of all [1], norm of each [n] if asked for, else [0])."""
    return _norms(tensor_lists[0], 1.0, per_tensor, noop_flag)


@kernel
def multi_tensor_unscale_l2norm(chunk_size, noop_flag, tensor_lists, inv_scale, per_tensor=None):
    return _norms(tensor_lists[0], inv_scale.item(), per_tensor, noop_flag)


@kernel
def multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale):
    """out = in * scale for each of (in, out); flags an in that is not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        if not source.isfinite().all():
            is_infinite.fill_(1)
        target.copy_(source.float() * scale)


@kernel
def multi_tensor_scale_tensor(chunk_size, is_infinite, tensor_lists, scale):
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, scale.item())


@kernel
def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction,
    weight_decay,
):  # fmt: skip
    """tensor_lists: gradients, parameters, m, v and, optionally, fp32 master parameters.

    mode: 0 for L2 regularisation, 1 for decoupled weight decay.
    """
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, m, v, *master in zip(*tensor_lists, strict=True):
        current = (master[0] if master else parameter).float()
        g = grad.float() + (weight_decay * current if mode == 0 else 0)
        m32 = beta1 * m.float() + (1 - beta1) * g
        v32 = beta2 * v.float() + (1 - beta2) * g * g
        update = (m32 / corrections[0]) / ((v32 / corrections[1]).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * current
        current = current - lr * update
        m.copy_(m32), v.copy_(v32), parameter.copy_(current)
        if master:
            master[0].copy_(current)
