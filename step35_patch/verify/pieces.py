"""What of the weights is in memory at a time: one module's, or a block of the vocabulary's rows.

Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from step35_patch.tensors.published import layer_tensors

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

# Rows of the embedding and of the output matrices that are read at a time.
VOCABULARY_ROWS = 4096

# What can be computed in, and the bytes of a number of it.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

# These are used in one call, and so are in memory together.
_TOGETHER = {"q_proj", "k_proj", "v_proj", "g_proj", "gate_proj", "up_proj"}


def vocabulary_blocks(size: int) -> Iterator[slice]:
    """The rows of a vocabulary of `size` that are read at a time, from first to last."""
    for start in range(0, size, VOCABULARY_ROWS):
        yield slice(start, min(start + VOCABULARY_ROWS, size))


def is_output_matrix(name: str) -> bool:
    """Whether a layer's tensor is an MTP layer's output matrix, which is compared by itself."""
    return name.endswith("shared_head.output.weight")


def largest_weights(config: Step35Config, dtype: str) -> int:
    """Bytes of the most weights that one side has in memory at a time.

    They are those of one module: q, k, v and the gate; gate and up of an MLP or of one expert; or
    a block of the vocabulary.

    Args:
        config: of the model.
        dtype: what is computed in, "float32" or "bfloat16".
    """
    elements: Counter[tuple[str, str]] = Counter()
    for plan in config.layers:
        for tensor in layer_tensors(config, plan):
            if is_output_matrix(tensor.name):
                continue  # read by blocks
            module, _, name = tensor.name.removesuffix(".weight").rpartition(".")
            # The last two dimensions are those of one expert.
            key = module, "" if name in _TOGETHER else name
            elements[key] += math.prod(tensor.shape[-2:])
    rows = min(VOCABULARY_ROWS, config.vocab_size)
    return max(rows * config.hidden_size, *elements.values()) * DTYPE_BYTES[dtype]
