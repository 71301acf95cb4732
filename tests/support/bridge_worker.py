"""What ranks do with Megatron-Bridge for tests/bridge."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from support import bridge_on_cpu

bridge_on_cpu.install()

import torch  # noqa: E402
from megatron.bridge import AutoBridge  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import step35_patch  # noqa: E402
from step35_patch.bridge import Step35Bridge, Step35BridgeProvider  # noqa: E402


def start() -> None:
    """torch.distributed, as Megatron-Bridge expects to find it or else starts it with NCCL."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def provided(
    folder: Path, gate_layout: str, fields: dict[str, Any]
) -> tuple[AutoBridge, list[torch.nn.Module]]:
    """AutoBridge's bridge of a folder, and the model that it makes, with the folder's weights."""
    step35_patch.activate(gate_layout=gate_layout)
    start()
    bridge = AutoBridge.from_hf_pretrained(folder)
    assert isinstance(bridge._model_bridge, Step35Bridge)
    provider = bridge.to_megatron_provider()
    assert isinstance(provider, Step35BridgeProvider)
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.pipeline_dtype = torch.float32
    provider.finalize()
    provider.initialize_model_parallel(seed=1)
    options = {"wrap_with_ddp": False, "use_cpu_initialization": True}
    return bridge, provider.provide_distributed_model(**options)


def convert(folder: str, out: str, gate_layout: str, fields: str) -> None:
    """Load, halve, export and save a folder; in one process, its logits besides.

    A half is exact. It shows that what is exported is what the model has.
    """
    bridge, chunks = provided(Path(folder), gate_layout, json.loads(fields))
    Path(out).mkdir(exist_ok=True)
    if int(os.environ["WORLD_SIZE"]) == 1:
        tokens = torch.load(Path(folder, "tokens.pt"))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            torch.save(chunks[0].eval()(tokens, positions, None), Path(out, "logits.pt"))
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(0.5)
    exported = dict(bridge.export_hf_weights(chunks, show_progress=False))
    bridge.save_hf_pretrained(chunks, out, show_progress=False)
    if torch.distributed.get_rank() == 0:
        saved = load_file(Path(out, "model.safetensors"))
        assert saved.keys() == exported.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in exported.items())
