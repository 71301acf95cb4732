"""A model whose vocabulary is padded, and one rank of tests/model/test_padded_vocabulary.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from step35_patch import Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights
from support.ours import initialize_megatron, published_gradients, run
from support.parity import LOGITS, LOSS, relative


def matrices(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The output layer, and the MTP layers' output matrices."""
    return [model.output_layer, *model.mtp_output_heads.children()]


def build_padded(hf_dir: Path, size: int, **overrides: Any) -> torch.nn.Module:
    """A GPTModel with a vocabulary of `size`, as a script of a user's own would build it.

    Its padded rows are as large as others are, so that they are seen wherever they take part.
    """
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    initialize_megatron()
    model_parallel_cuda_manual_seed(1)
    MTPLossLoggingHelper.tracker.clear()
    options = {"transformer_impl": "local", "use_cpu_initialization": True}
    provider = Step35ModelProvider.from_hf(hf_dir, **(options | overrides))
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        provider, use_transformer_engine=False, normalization="RMSNorm"
    )
    model = GPTModel(
        config=provider,
        transformer_layer_spec=spec,
        vocab_size=size,
        max_sequence_length=256,
        parallel_output=provider.parallel_output,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=gpt_layer_specs.get_gpt_mtp_block_spec(
            provider, spec, use_transformer_engine=False
        ),
    )
    load_hf_weights(model, hf_dir)
    with torch.no_grad():
        for matrix in matrices(model):
            rows = padded_rows(model, matrix.weight)
            rows.copy_(torch.randn(rows.shape) / 4)
    return model


def padded_rows(model: torch.nn.Module, part: torch.Tensor) -> torch.Tensor:
    """Those of a rank's part of an output matrix, or of its gradient."""
    columns = model.config.vocab_size - model.pg_collection.tp.rank() * part.shape[0]
    return part[max(columns, 0) :]


def main(hf_dir: str, expected: str) -> None:
    """Two tensor-parallel ranks: padding on the last one beside the vocabulary's end, and alone.

    `expected` is a file with tokens, and the logits and loss that they have to give. A rank has
    parts of some gradients, so that they are compared with those of the unpadded model.
    """
    initialize_megatron(int(os.environ["WORLD_SIZE"]), tensor_model_parallel_size=2)
    case = torch.load(expected)
    columns = case["logits"].shape[-1]
    options = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    wanted = gradients(build_padded(Path(hf_dir), columns, **options), case)
    for size in (142, 2 * columns):
        for parallel_output in (True, False):
            model = build_padded(Path(hf_dir), size, parallel_output=parallel_output, **options)
            logits = whole(model, run(model, case["input_ids"]))
            assert logits.shape[-1] == size
            assert relative(logits[..., :columns], case["logits"]) < LOGITS
            assert logits[..., columns:].max() < -1e37
            assert logits[..., columns:].softmax(-1).isfinite().all()
            if parallel_output:  # which losses need
                found = gradients(model, case)
                off = {name: (found[name] - wanted[name]).abs().max().item() for name in wanted}
                largest = max(tensor.abs().max().item() for tensor in wanted.values())
                assert max(off.values()) < 1e-5 * largest, off
                for matrix in matrices(model):
                    assert not padded_rows(model, matrix.weight.grad).any()
    print(f"rank {torch.distributed.get_rank()} ok")
    torch.distributed.barrier()


def whole(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] of a rank's logits, which are its part or gathered already."""
    if not model.parallel_output:
        return logits
    group = model.pg_collection.tp
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(parts, logits.detach(), group=group)
    return torch.cat(parts, dim=-1)


def gradients(model: torch.nn.Module, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By published name, after the loss is found to be right."""
    losses = run(model, case["input_ids"], case["labels"])
    assert abs(losses.mean().item() / case["loss"].item() - 1) < LOSS
    losses.mean().backward()
    return published_gradients(model)
