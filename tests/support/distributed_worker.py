"""One rank of tests/checkpoint/test_distributed.py: load, compare the loss, save, compare files.

The last stage's loss on the tokens of seed 1 must be the expected one; the weights that are saved
must be those that were loaded, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support import implementation

implementation.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from step35_patch import Step35ModelProvider  # noqa: E402
from step35_patch.checkpoint import load_hf_weights, save_hf_weights  # noqa: E402
from support.ours import initialize_megatron  # noqa: E402
from support.reference import WINDOW, random_tokens  # noqa: E402

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
)


def sizes_of(layout: dict) -> dict[str, int]:
    """The parallel sizes in a provider's overrides, for `initialize_model_parallel`."""
    return {name: layout[name] for name in _SIZES if name in layout}


def build_chunks(hf_dir: Path, layout: dict) -> list[torch.nn.Module]:
    initialize_megatron(int(os.environ["WORLD_SIZE"]), **sizes_of(layout))
    model_parallel_cuda_manual_seed(1)
    options = {
        "transformer_impl": implementation.IMPLEMENTATION,
        "moe_grouped_gemm": implementation.ON_TRANSFORMER_ENGINE,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
        "moe_token_dispatcher_type": "alltoall",
        "variable_seq_lengths": False,
    }
    return chunks_of(Step35ModelProvider.from_hf(hf_dir, **(options | layout)))


def chunks_of(provider: Step35ModelProvider) -> list[torch.nn.Module]:
    """This rank's model chunks."""
    chunks: list[torch.nn.Module] = []
    virtual = provider.virtual_pipeline_model_parallel_size
    for stage in range(virtual) if virtual else [None]:
        at = {"ignore_virtual": False, "vp_stage": stage}
        chunks.append(
            provider.provide(
                pre_process=parallel_state.is_pipeline_first_stage(**at),
                post_process=parallel_state.is_pipeline_last_stage(**at),
                vp_stage=stage,
            )
        )
        # Megatron-Core's schedules read it from each chunk.
        chunks[-1].model_type = chunks[0].model_type
    return chunks


def mean_loss(chunks: list[torch.nn.Module]) -> float | None:
    """The mean loss of two microbatches of one sample each, on the last stage; else None."""
    length = 3 * WINDOW
    input_ids, labels = random_tokens(1, 2, length)
    group = parallel_state.get_context_parallel_group()

    def step(iterator, model):
        index = next(iterator)
        batch = {
            "tokens": input_ids[index : index + 1],
            "labels": labels[index : index + 1],
            "position_ids": torch.arange(length)[None],
        }
        batch = {name: this_rank(tensor) for name, tensor in batch.items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, mean

    def this_rank(tensor):
        """The early and the late chunk of [b, s] that context parallelism deals to this rank."""
        rank, size = group.rank(), group.size()
        chunks = tensor.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    def mean(losses):
        whole = losses.detach().mean()
        torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.SUM, group=group)
        return losses.mean(), {"loss": whole / group.size()}

    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(2)) for _ in chunks],
        model=chunks,
        num_microbatches=2,
        seq_length=length,
        micro_batch_size=1,
        forward_only=False,
    )
    return sum(found["loss"].item() for found in losses) / len(losses) if losses else None


def main(hf_dir: str, out_dir: str, expected: str, layout: str) -> None:
    """`layout` is JSON: overrides of Step35ModelProvider."""
    chunks = build_chunks(Path(hf_dir), json.loads(layout))
    load_hf_weights(chunks, hf_dir)
    loss = mean_loss(chunks)
    if loss is not None:
        assert abs(loss / float(expected) - 1) < 1e-5, (loss, expected)
    save_hf_weights(chunks, out_dir, max_shard_bytes=40_000)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        wanted = load_file(Path(hf_dir) / "model.safetensors")
        found = {}
        for file in Path(out_dir).glob("*.safetensors"):
            found |= load_file(file)
        assert set(found) == set(wanted), set(found) ^ set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    indices = sorted(
        module.plan.index
        for chunk in chunks
        for module in chunk.modules()
        if hasattr(module, "plan")
    )
    # One write, because the ranks share the pipe.
    sys.stdout.write(f"rank {torch.distributed.get_rank()} layers {indices} ok\n")
    sys.stdout.flush()
    torch.distributed.barrier()
