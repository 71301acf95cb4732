"""One rank of tests/checkpoint/test_refit.py."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from step35_patch.checkpoint import published_tensors_of, save_hf_weights
from support.distributed_worker import build_chunks
from support.resaved import load_by_transformers

EXAMPLE = Path(__file__).parents[2] / "examples" / "refit_transformers.py"
M_MMAP_THRESHOLD = -3


def refit(hf_dir: str, out: str, *arguments: str) -> None:
    """Run the example: after each step its engine is what transformers loads of a saved folder."""
    spec = importlib.util.spec_from_file_location("refit_transformers", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = json.loads((Path(hf_dir) / "config.json").read_text())
    seen: list[dict[str, torch.Tensor]] = []

    def compare(model: Any, engine: Any) -> None:
        folder = Path(out) / str(len(seen))
        save_hf_weights(model, folder)
        seen.append({})
        if engine is None:
            return
        wanted = load_by_transformers(folder, config, torch.float32)
        found = engine.model.state_dict() | {"lm_head.weight": engine.lm_head.weight.detach()}
        loaded = wanted.model.language_model.state_dict()
        loaded |= {"lm_head.weight": wanted.lm_head.weight.detach()}
        assert set(found) == set(loaded), set(found) ^ set(loaded)
        off = [name for name in loaded if not torch.equal(found[name], loaded[name])]
        assert not off, off
        seen[-1] = {name: tensor.clone() for name, tensor in found.items()}
        if len(seen) > 1:
            same = [name for name in found if torch.equal(seen[-2][name], found[name])]
            assert not [name for name in same if "e_score_correction_bias" not in name], same

    example.main([hf_dir, *arguments], compare)
    assert len(seen) == 2
    sys.stdout.write("refitted\n")


def memory(hf_dir: str, layout: str) -> None:
    """What going through all tensors adds at most to the process's memory, of the largest one."""
    chunks = build_chunks(Path(hf_dir), json.loads(layout))
    # Freed memory goes back at once.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    names, largest, total = [], 0, 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _bytes("VmRSS")
    for name, tensor in published_tensors_of(chunks, every_stage=True):
        names.append(name)
        largest, total = max(largest, tensor.nbytes), total + tensor.nbytes
    peak = _bytes("VmHWM") - before
    found = {"names": names, "largest": largest, "total": total, "peak": peak}
    sys.stdout.write(f"memory {json.dumps(found)}\n")
    sys.stdout.flush()
    torch.distributed.barrier()


def _bytes(what: str) -> int:
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
