"""Builds a model on Transformer Engine's modules and loads a converted checkpoint into it.

    python transformer_engine_worker.py HF_DIR CHECKPOINT GATE_LAYOUT

Prints the names of tensors that are not what load_hf_weights gives, if any, and "compared N".
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformer_engine.pytorch  # noqa: F401, before the stand-in, which would hide it

from step35_patch import cpu

sys.path[0] = str(Path(__file__).parents[1])  # tests/, in which "support" is found
cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402

from step35_patch import Step35ModelProvider  # noqa: E402
from step35_patch.checkpoint import load_hf_weights, published_tensors_of  # noqa: E402
from support.ours import initialize_megatron  # noqa: E402

METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def build(hf_dir: str, gate_layout: str) -> torch.nn.Module:
    return Step35ModelProvider.from_hf(
        hf_dir,
        transformer_impl="transformer_engine",
        moe_grouped_gemm=True,
        use_cpu_initialization=True,
        gate_layout=gate_layout,
    ).provide()


def main() -> None:
    hf_dir, checkpoint, gate_layout = sys.argv[1:]
    initialize_megatron()
    wanted, model = build(hf_dir, gate_layout), build(hf_dir, gate_layout)
    load_hf_weights(wanted, hf_dir)
    for parameter in model.parameters():  # none may keep its random start
        torch.nn.init.constant_(parameter, float("nan"))
    sharded = {"model": model.sharded_state_dict(metadata=METADATA)}
    # "unexpected" is what the model asks for and the checkpoint has not.
    state, _, unexpected = dist_checkpointing.load(
        sharded, f"{checkpoint}/release", strict="return_all"
    )
    assert not unexpected, unexpected
    model.load_state_dict(state["model"], strict=True)
    expected = dict(wanted.named_parameters())
    for name, found in model.named_parameters():
        if not torch.equal(found, expected[name]):
            print(name)
    published = dict(published_tensors_of(wanted))
    for name, found in published_tensors_of(model):
        if not torch.equal(found, published[name]):
            print(name)
    print("compared", len(expected), "parameters")


if __name__ == "__main__":
    main()
