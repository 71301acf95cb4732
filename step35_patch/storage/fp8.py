"""Weights in FP8 with a scale for each block, back to the dtype that they were made of.

    weight = (fp8.float() * scale_inv.float()).to(dtype)

element by element, with the `scale_inv` of the block that the element is in. Blocks begin at the
first row and column of each matrix; those at its end may be cut short, so that there are
ceil(rows / block rows) x ceil(columns / block columns) of them. The tensors of routed experts
[experts, rows, columns] are so many matrices. It is the format of DeepSeek-V3 and of
transformers' `FineGrainedFP8Config`, whose `Fp8Dequantize` computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are computed at a time, in fp32, whatever is asked for.
_AT_ONCE = 2**20


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The sizes of the scales of a weight.

    Args:
        shape: Of the weight, [..., rows, columns].
        block: Rows and columns of a block.
    """
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize_rows(
    values: Tensor,
    scales: Tensor,
    *,
    first: int,
    rows: int,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Some rows of a weight, or of a stack of weights one below the other.

    Args:
        values: [n, columns], FP8.
        scales: [..., block rows, block columns], of the whole weight or stack.
        first: Which of all rows, through the stack, the first of `values` is.
        rows: Of one weight of the stack.
        block: Rows and columns of a block.
        dtype: Of the result.

    Returns:
        [n, columns].
    """
    count, columns = values.shape
    in_blocks = scales.shape[-2]
    table = scales.reshape(-1, scales.shape[-1])
    result = values.new_empty(values.shape, dtype=dtype)
    at_once = max(1, _AT_ONCE // columns)
    for start in range(0, count, at_once):
        part = values[start : start + at_once].float()
        row = torch.arange(first + start, first + start + len(part), device=values.device)
        of_rows = table[row // rows * in_blocks + row % rows // block[0]].float()
        part *= of_rows.repeat_interleave(block[1], dim=1)[:, :columns]
        result[start : start + len(part)] = part
    return result
