"""What of the weights is in memory at a time: one module's, or a block of the vocabulary's rows.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.table import layer_rows

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

# Rows of the embedding and of the output matrices that are read at a time.
VOCABULARY_ROWS = 4096

# What can be computed in, and the bytes of a number of it.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def vocabulary_blocks(size: int) -> Iterator[slice]:
    """The rows of a vocabulary of `size` that are read at a time, from first to last."""
    for start in range(0, size, VOCABULARY_ROWS):
        yield slice(start, min(start + VOCABULARY_ROWS, size))


def largest_weights(config: Step35Config, dtype: str) -> int:
    """Bytes of the most weights that one side has in memory at a time.

    They are those of one module: q, k, v and the gate; gate and up of an MLP or of one expert; or
    a block of the vocabulary.

    Args:
        config: of the model.
        dtype: what is computed in, "float32" or "bfloat16".
    """
    rows = [
        row.num_elements // (row.shape[0] if row.is_expert else 1)
        for plan in config.layers
        for row in layer_rows(config, plan, GATE_LAYOUTS[0])
        if not row.is_vocabulary  # which is read by blocks
    ]
    block = min(VOCABULARY_ROWS, config.vocab_size) * config.hidden_size
    return max(block, *rows) * DTYPE_BYTES[dtype]
