"""APEX's kernel that adds a weight's gradient to `main_grad`.

Megatron-Core's own linear layers (the output layers, on Transformer Engine too) call it under
--gradient-accumulation-fusion.
"""

from __future__ import annotations

import sys
import types

import torch


def install() -> None:
    """Make `import fused_weight_gradient_mlp_cuda` work; before the first `import megatron`."""
    module = types.ModuleType("fused_weight_gradient_mlp_cuda", __doc__)

    def add(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        grad = grad_output.flatten(0, -2).float().T @ total_input.flatten(0, -2).float()
        main_grad.add_(grad.to(main_grad.dtype))

    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = add
    sys.modules[module.__name__] = module
