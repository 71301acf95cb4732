"""One rank of a run of tests/support/gradient_cases.py: some steps, all tensors by published name.

Megatron-Core's own schedules, DistributedDataParallel, finalize_model_grads and optimizer, in the
order in which Megatron's training loop calls them. The run with one process is kept; every other
run is held against it, tensor by tensor, on each rank that has the tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from support import implementation

implementation.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402

from step35_patch import Step35ModelProvider  # noqa: E402
from step35_patch.checkpoint import load_hf_weights, published_tensors_of  # noqa: E402
from step35_patch.verify.live_gradients import published_gradients  # noqa: E402
from support import rank_faults  # noqa: E402
from support.distributed_worker import chunks_of, sizes_of  # noqa: E402
from support.ours import initialize_megatron, make_optimizer  # noqa: E402

try:  # Megatron-Core 0.18 and later
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
except ImportError:
    get_moe_metrics_tracker = None

STEPS, LENGTH = 3, 48
# Documents of one sample, and the slots that they are padded to; each sample begins elsewhere.
DOCUMENTS, SLOTS = (13, 20, 7), (16, 24, 8)
# Of the tokens of documents as long as the slots. In none of the steps is an activation within 2e-6
# of its clamp, on whose edge a gradient is there or not by rounding; of 0, one is 1e-7 from it.
ALIGNED_SEED = 4500
# An epsilon that does not magnify the rounding of gradients near zero.
LEARNING_RATE, EPS, CLIP, WEIGHT_DECAY = 1e-3, 1e-4, 1.0, 0.1
BALANCING = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.01,
    "moe_router_bias_update_rate": 1e-3,
}


def main(hf_dir: str, reference: str, out: str, spec: str) -> None:
    """Run, and write what was found.

    Args:
        hf_dir: the weights to start from.
        reference: the file of the run with one process, or "" to write it.
        out: that file, or the folder for each rank's differences from it.
        spec: JSON, the fields of `gradient_cases.Case`.
    """
    document = json.loads(spec)
    if document["fault"]:
        rank_faults.put_in(document["fault"])
    run = Run(Path(hf_dir), document)
    found = run.train()
    if not reference:
        torch.save(found, out)
        return
    wanted = torch.load(reference)
    rank = torch.distributed.get_rank()
    document = {
        "logs": found["logs"],
        "squares": {n: t.double().square().sum().item() for n, t in found["gradients"].items()},
        **{
            what: {n: difference(t, wanted[what][n]) for n, t in found[what].items()}
            for what in ("gradients", "changes")
        },
    }
    Path(out, f"{rank}.json").write_text(json.dumps(document))
    torch.distributed.barrier()


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest value; infinite where a value is no number."""
    largest = wanted.abs().max().item() or 1.0
    apart = (found - wanted).abs().max().item() / largest
    return apart if apart == apart else float("inf")


class Run:
    """The model chunks of this rank with their optimizer, and what they are trained on."""

    def __init__(self, hf_dir: Path, spec: dict[str, Any]):
        self.spec = spec
        self.provider = provider = _provider(hf_dir, spec)
        sizes: dict[str, Any] = sizes_of(spec["layout"])
        implementation.install(cudnn="context_parallel_size" in sizes)
        if spec["embedding_ranks"]:
            sizes["get_embedding_ranks"] = provider.embedding_ranks
        initialize_megatron(int(os.environ["WORLD_SIZE"]), **sizes)
        model_parallel_cuda_manual_seed(1)
        MTPLossLoggingHelper.tracker.clear()
        bare = chunks_of(provider)
        load_hf_weights(bare, hf_dir)
        sharded, overlap = spec["distributed_optimizer"], spec["overlap"]
        how = DistributedDataParallelConfig(
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            bucket_size=20_000 if overlap else None,  # several buckets in so small a model
        )
        self.chunks = [
            DistributedDataParallel(provider, how, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(bare)
        ]
        for chunk in self.chunks:
            chunk.train()
        decoupled = spec["decoupled_lr"]
        learning_rate = spec["optimizer"].get("lr", LEARNING_RATE)
        self.optimizer = make_optimizer(
            OptimizerConfig(
                min_lr=0.0,
                weight_decay=WEIGHT_DECAY,
                adam_eps=EPS,
                clip_grad=CLIP,
                params_dtype=torch.float32,
                use_distributed_optimizer=sharded,
                overlap_param_gather=overlap,
                **({"optimizer": "adam", "lr": learning_rate} | spec["optimizer"]),
                **({"decoupled_lr": decoupled, "decoupled_min_lr": 0.0} if decoupled else {}),
            ),
            self.chunks,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = (group.get("max_lr") if decoupled else None) or learning_rate
        # As Megatron's training loop does.
        provider.finalize_model_grads_func = finalize_model_grads
        if overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            provider.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def train(self, steps: int = STEPS) -> dict[str, Any]:
        """Gradients of the first step, logs of all, changes of the weights over all."""
        start = self._published()
        batches, logs, gradients = self.batches(), [], {}
        for number in range(steps):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=[iter(batches) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=batches[0]["seq_length"],
                micro_batch_size=1,
                forward_only=False,
            )
            if number == 0:
                gradients = published_gradients(self.chunks)
            _, norm, _ = self.optimizer.step()
            logs.append(self._logged(losses, len(batches)) | {"grad norm": float(norm)})
        if self.spec["overlap"]:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
        end = self._published()
        return {
            "gradients": gradients,
            "changes": {name: end[name] - start[name] for name in end},
            "logs": logs,
        }

    def _published(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: tensor.clone() for name, tensor in published_tensors_of(self.chunks)}

    def _logged(self, losses: list[dict[str, torch.Tensor]], count: int) -> dict[str, float]:
        """What Megatron's training loop logs of one step, on the ranks that know it."""
        logged: dict[str, torch.Tensor] = {}
        if losses:
            total = torch.stack([found["lm loss"] for found in losses]).sum(0)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(total, group=group)
            logged["lm loss"] = total[0] / total[1]
        MTPLossLoggingHelper.track_mtp_metrics(1 / count, 1, None, None, logged)
        if self.spec["balancing"]:
            config = self.provider
            # Megatron-Core 0.17 has the function, the others the tracker.
            track = (
                get_moe_metrics_tracker().report
                if get_moe_metrics_tracker
                else moe_utils.track_moe_metrics
            )
            track(
                loss_scale=1 / count,
                iteration=1,
                force_initialize=True,
                track_names=["seq_load_balancing_loss", "z_loss"],
                num_layers=config.num_layers,
                moe_layer_freq=config.moe_layer_freq,
                mtp_num_layers=config.mtp_num_layers,
                total_loss_dict=logged,
            )
            moe_utils.clear_aux_losses_tracker()
        return {name: float(value) for name, value in logged.items()}

    def batches(self) -> list[dict[str, Any]]:
        """This rank's share of this data-parallel rank's micro-batches."""
        return [
            {
                "seq_length": batch["tokens"].shape[1],
                "own_loss": self.spec["own_loss"],
                **self.share(batch),
            }
            for batch in self.whole_batches()
        ]

    def share(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What context parallelism deals to this rank of tensors [1, s]."""
        group = parallel_state.get_context_parallel_group()
        return _share(batch, group.rank(), group.size())

    def whole_batches(self) -> list[dict[str, Any]]:
        """This data-parallel rank's micro-batches of one sample each."""
        samples = self.spec["samples"]
        ranks = parallel_state.get_data_parallel_world_size()
        own = range(samples)[parallel_state.get_data_parallel_rank() * samples // ranks :]
        documents, mask = self.spec["documents"], self.spec["mask"]
        return [
            _packed(sample, documents, mask)
            if documents
            else _plain(sample, samples, mask, self.provider.vocab_size, self.spec["tokens"])
            for sample in own[: samples // ranks]
        ]


def _provider(hf_dir: Path, spec: dict[str, Any]) -> Step35ModelProvider:
    options: dict[str, Any] = {
        "transformer_impl": implementation.IMPLEMENTATION,
        "moe_grouped_gemm": implementation.ON_TRANSFORMER_ENGINE,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
        "moe_token_dispatcher_type": "alltoall",
        "variable_seq_lengths": False,
        "mtp_loss_scaling_factor": 0.3,
        "calculate_per_token_loss": spec["per_token"],
    }
    if spec["balancing"]:
        options |= BALANCING
    return Step35ModelProvider.from_hf(hf_dir, **(options | spec["layout"]))


def _forward_step(iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> Any:
    batch = next(iterator)
    packed = batch.get("packed_seq_params")
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=None if batch["own_loss"] else batch["labels"],
        loss_mask=batch["loss_mask"],
        **({"packed_seq_params": packed} if packed else {}),
    )
    loss = partial(_loss, batch["loss_mask"])
    if not batch["own_loss"]:
        return output, loss
    return output, lambda logits: loss(
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    )


def _loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    """As pretrain_gpt.py's: sum of the tokens' losses, their number, and both for the log."""
    loss, tokens = torch.sum(losses.float() * loss_mask), loss_mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def _tokens(seed: int, length: int, vocabulary: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and the ones after them, [length]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(1, vocabulary, (length + 1,), generator=generator)
    return tokens[:-1], tokens[1:]


def _plain(sample: int, samples: int, mask: str, vocabulary: int, seed: int) -> dict[str, Any]:
    tokens, labels = _tokens(seed + sample, LENGTH, vocabulary)
    counted = torch.ones(LENGTH)
    if mask == "prompts":
        counted[: 5 + 9 * sample % (LENGTH - 8)] = 0
    elif mask.startswith("all but the last"):
        counted[: LENGTH - LENGTH * int(mask.split()[-1][0]) // 8] = 0
    elif mask == "first half of the samples":
        counted[:] = float(2 * sample >= samples)
    else:
        assert mask == "", mask
    batch = {"tokens": tokens, "labels": labels, "loss_mask": counted}
    return {
        **{name: tensor[None] for name, tensor in batch.items()},
        "position_ids": torch.arange(LENGTH)[None],
    }


def _packed(sample: int, documents: str, mask: str) -> dict[str, Any]:
    """Three documents one after the other, or each at the start of a slot with padding behind."""
    assert mask in ("", "documents"), mask
    turn = sample % len(DOCUMENTS)
    lengths, seed = (SLOTS, ALIGNED_SEED) if documents == "aligned" else (DOCUMENTS, 0)
    slots = lengths if documents == "packed" else SLOTS
    lengths, slots = (x[turn:] + x[:turn] for x in (lengths, slots))
    batch: dict[str, Any] = {
        "tokens": torch.full((1, sum(slots)), 9),
        "labels": torch.full((1, sum(slots)), 9),
        "loss_mask": torch.zeros(1, sum(slots)),
        "position_ids": torch.zeros(1, sum(slots), dtype=torch.long),
    }
    start = 0
    for number, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        own = slice(start, start + length)
        tokens, labels = _tokens(seed + 100 * sample + number, length)
        batch["tokens"][0, own], batch["labels"][0, own] = tokens, labels
        batch["loss_mask"][0, own] = float(not mask or (sample + number) % 3 == 1)
        batch["position_ids"][0, start : start + slot] = torch.arange(slot)
        start += slot
    bounds = _bounds(lengths)
    padded = _bounds(slots) if documents == "slots" else None
    batch["packed_seq_params"] = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(slots),
        max_seqlen_kv=max(slots),
    )
    return batch


def _bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _share(batch: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """The early and the late chunk of each document that context parallelism deals to a rank."""
    if size == 1:
        return batch
    packed, length = batch.get("packed_seq_params"), batch["tokens"].shape[1]
    bounds = _bounds((length,))
    if packed is not None:
        padded = packed.cu_seqlens_q_padded
        bounds = packed.cu_seqlens_q if padded is None else padded
    rows = torch.cat(
        [
            part
            for document in torch.arange(length).split(bounds.diff().tolist())
            for part in (document.chunk(2 * size)[n] for n in (rank, 2 * size - 1 - rank))
        ]
    )
    return {
        name: value[:, rows] if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
