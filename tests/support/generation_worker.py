"""One rank of tests/model/test_generation_layouts.py: prompts through Megatron-Core's engine.

Each rank looks whether its cache has its own part of the key heads, of its own layers; the first
one writes what was generated.
"""

from __future__ import annotations

import json
from pathlib import Path

from support import distributed_worker

# isort: split
import torch

from step35_patch.checkpoint import load_hf_weights
from support.generation import by_the_engine
from support.provider_layouts import TP


def main(hf_dir: str, prompts: str, new: str, out: str, layout: str) -> None:
    """Write the sequences as a list to a file.

    Args:
        hf_dir: the weights.
        prompts: a file with a list of tensors [s], of different lengths.
        new: how many tokens to generate.
        out: the file.
        layout: JSON, overrides of Step35ModelProvider.
    """
    sizes = json.loads(layout)
    [model] = distributed_worker.build_chunks(Path(hf_dir), sizes)
    load_hf_weights(model, hf_dir)
    sequences, context = by_the_engine(model, torch.load(prompts), int(new), legacy=True)
    groups = model.config.num_query_groups // sizes.get(TP, 1)
    shapes = {n: keys.shape[2] for n, (keys, _) in context.key_value_memory_dict.items()}
    assert shapes == {layer.plan.index + 1: groups for layer in model.decoder.layers}, shapes
    if torch.distributed.get_rank() == 0:
        torch.save(sequences, out)
    torch.distributed.barrier()
