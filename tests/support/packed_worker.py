"""One rank of tests/model/test_packed_parity.py: packed documents against transformers.

Every rank has the reference compute each document by itself, and compares its own tokens' logits
and the published gradients of one step.
"""

from __future__ import annotations

import json
from pathlib import Path

from support import gradient_worker

# isort: split
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file
from torch import Tensor

from step35_patch.model.layer import Step35DecoderLayer
from support.gradient_worker import difference
from support.reference import Reference

_MTP_SCALE = 0.3  # of gradient_worker's provider


def main(hf_dir: str, spec: str, out: str) -> None:
    """Write what was found to a file of `out`, named by the rank.

    Args:
        hf_dir: the weights.
        spec: JSON, the fields of `gradient_cases.Case`, of packed documents in padded slots.
        out: a folder.
    """
    run = gradient_worker.Run(Path(hf_dir), json.loads(spec))
    model = Reference(
        json.loads(Path(hf_dir, "config.json").read_text()),
        load_file(Path(hf_dir) / "model.safetensors"),
    )
    wanted, logits = _reference(model, run.whole_batches())
    largest = max(found.abs().max().item() for found in logits)
    worst = 0.0
    for chunk in run.chunks:
        chunk.eval()
        with torch.no_grad():
            for own, whole, expected in zip(
                run.batches(), run.whole_batches(), logits, strict=True
            ):
                found = chunk(
                    own["tokens"],
                    own["position_ids"],
                    None,
                    packed_seq_params=own["packed_seq_params"],
                )
                found = gather_from_tensor_model_parallel_region(found)
                # Positions in the whole batch travel as the tokens do.
                place = run.share(whole | {"place": torch.arange(expected.shape[1])[None]})["place"]
                counted = own["loss_mask"][0] > 0
                apart = (found[0] - expected[0, place[0]]).abs()[counted]
                worst = max(worst, apart.max().item() / largest if counted.any() else 0.0)
        chunk.train()
    gradients = {
        name: difference(found, wanted[name])
        for name, found in run.train(steps=1)["gradients"].items()
        if "router_bias" not in name
    }
    # Transformer Engine's attention says how it communicates; ours has one way.
    kinds = [
        getattr(layer.self_attention.core_attention, "cp_comm_type", None)
        for chunk in run.chunks
        for layer in chunk.modules()
        if isinstance(layer, Step35DecoderLayer)
    ]
    found = {"logits": worst, "gradients": gradients, "cp_comm_type": kinds}
    Path(out, f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def _reference(model: Reference, batches: list[dict]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients of all batches' documents, and each batch's logits at their places."""
    logits, counts, objectives = [], [], []
    for batch in batches:
        packed = batch["packed_seq_params"]
        lengths = packed.cu_seqlens_q.diff().tolist()
        starts = packed.cu_seqlens_q_padded.tolist()
        placed = torch.zeros(1, batch["tokens"].shape[1], model.config["vocab_size"])
        sums, own_counts = [0.0] * (1 + model.mtp), [0] * (1 + model.mtp)
        for start, length in zip(starts, lengths, strict=False):
            own = slice(start, start + length)
            found, loss, mtp_losses = model.losses(batch["tokens"][:, own], batch["labels"][:, own])
            placed[:, own] = found.detach()
            for depth, mean in enumerate((loss, *mtp_losses)):
                sums[depth] += mean * (length - depth)
                own_counts[depth] += length - depth
        main, *mtp = [total / count for total, count in zip(sums, own_counts, strict=True)]
        logits.append(placed)
        counts.append(own_counts[0])
        objectives.append(main + _MTP_SCALE * sum(mtp) / len(mtp))
    whole = sum(loss * count for loss, count in zip(objectives, counts, strict=True))
    (whole / sum(counts)).backward()
    return model.gradients(), logits
