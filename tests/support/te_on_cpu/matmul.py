"""Matrix products: cuBLAS's, which are behind Linear, LayerNormLinear and GroupedLinear.

cuBLAS counts by columns: what it calls A @ B is, of row-major tensors, op(B) @ op(A). Dimensions
before the last count as one.
"""

from __future__ import annotations

import torch

from support.te_on_cpu.extension import kernel, no_quantizer, plain, refuse, torch_dtype


def _matmul(a: torch.Tensor, transa: bool, b: torch.Tensor, transb: bool) -> torch.Tensor:
    a = a.reshape(-1, a.shape[-1]).float()
    b2d = b.reshape(-1, b.shape[-1]).float()
    product = (b2d.T if transb else b2d) @ (a.T if transa else a)
    return product if transb else product.view(*b.shape[:-1], product.shape[-1])


@kernel
def generic_gemm(
    A, transA, B, transB, D, quantizer, output_dtype, bias, bias_type, gelu, gelu_in, grad,
    workspace, workspace_size, accumulate, use_split_accumulator,
    comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False, alpha=1.0, beta=None,
):  # fmt: skip
    """D = alpha * op(B) @ op(A) + beta * D, + bias; with `grad`, the bias's gradient from B.

    Returns (D, gradient of the bias or None, input of gelu or None, extra_output or None).
    """
    no_quantizer(quantizer, "generic_gemm")
    refuse("generic_gemm with gelu", not gelu)
    overlap = comm_overlap is None and comm_type is None and extra_output is None
    refuse("generic_gemm with communication overlap", overlap and not bulk_overlap)
    A, B = plain(A, "generic_gemm's A"), plain(B, "generic_gemm's B")
    assert A.dtype == B.dtype, (A.dtype, B.dtype)
    beta = (1.0 if accumulate else 0.0) if beta is None else beta
    assert accumulate or beta == 0.0, beta
    dtype = A.dtype if output_dtype is None else torch_dtype(output_dtype)
    out = _matmul(A, transA, B, transB) * alpha
    bias_grad = None
    if bias is not None and grad:
        bias_grad = B.reshape(-1, B.shape[-1]).float().sum(0).to(dtype)
    elif bias is not None:
        out += bias.float()
    if D is None:
        assert not accumulate
        D = out.to(dtype)
    else:
        assert D.shape == out.shape and D.is_contiguous(), (D.shape, out.shape)
        assert output_dtype is None or D.dtype == dtype, (D.dtype, dtype)
        if accumulate:
            out += beta * D.float()
        D.copy_(out)
    return [D, bias_grad, None, None]


@kernel
def te_general_grouped_gemm(
    A, transa, B, transb, D, D_type, m_splits, bias, bias_type, single_output, pre_gelu_out, grad,
    workspace, workspace_size, accumulate, use_split_accumulator, math_sm_count,
):  # fmt: skip
    """generic_gemm of each A[i] and B[i] into D[i], or into the rows of D[0] (`single_output`).

    With `grad`, the biases' gradients are written to those entries of `bias` that are not empty.
    """
    refuse("te_general_grouped_gemm without D", D is not None)
    refuse("te_general_grouped_gemm with gelu", all(x.numel() == 0 for x in pre_gelu_out))
    dtype = torch_dtype(D_type)
    row = 0
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        a, b = plain(a, "te_general_grouped_gemm's A"), plain(b, "te_general_grouped_gemm's B")
        out = _matmul(a, transa, b, transb)
        if bias[i].numel() and not grad and out.numel():
            out += bias[i].float()
        elif bias[i].numel() and grad:
            bias[i].copy_(b.float().sum(0))
        if single_output:
            assert D[0].is_contiguous() and D[0].shape[-1] == out.shape[-1]
            target = D[0].view(-1, out.shape[-1])[row : row + out.shape[0]]
            row += out.shape[0]
        else:
            target = D[i]
        assert target.shape == out.shape and target.dtype == dtype, (target.shape, out.shape)
        target.copy_(target.float() + out if accumulate else out)
    return bias
