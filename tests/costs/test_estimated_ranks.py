"""What is estimated for a rank, against what Megatron-Core builds there."""

from __future__ import annotations

import json

import pytest
import torch
from support import built_ranks
from support.built_ranks import CASES, OPTIMIZERS, compare
from support.once import once

from step35_patch.costs.launch import Launch
from step35_patch.costs.optimizer_state import model_bytes
from step35_patch.costs.weights import Kind, Weight


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    folder = once(tmp_path_factory, "built-ranks", built_ranks.make)
    return json.loads((folder / "built.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_parameters_that_are_built(built, name):
    found = built[name]
    assert len(found["ranks"]) == CASES[name].ranks
    stages = compare(found, {"parameters": "parameters", "expert_parameters": "expert_parameters"})
    assert stages == {rank["pp"] for rank in found["estimate"]["ranks"]}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_in_flight_are_those_of_the_schedule(built, name):
    compare(built[name], {"held": "micro_batches_in_flight"})


def test_the_whole_models_parameters_are_those_of_one_rank(built):
    for name in ("adam fp32", "adam bf16"):
        assert built[name]["estimate"]["total_parameters"] == built[name]["ranks"][0]["parameters"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_the_optimizers_state_take_what_is_allocated(built, name):
    """Exactly; with the distributed optimizer but for padding, and where a rank's share begins."""
    found = built[name]
    of_stage = {rank["pp"]: rank["bytes"] for rank in found["estimate"]["ranks"]}
    off = 0.02 if "distributed" in name else 0
    for rank in found["ranks"]:
        for what in ("gradients", "optimizer"):
            assert of_stage[rank["pp"]][what] == pytest.approx(rank[what], rel=off), what


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_whole_matrices_are_dealt_out_as_megatron_deals_them(ranks):
    """By the layer-wise distributed optimizer, in one bucket."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    deal = getattr(LayerWiseDistributedOptimizer, "_compute_per_buffer_param_layout", None)
    if deal is None:
        pytest.skip("this Megatron-Core deals matrices out without regard to their sizes")
    matrices = [Weight(Kind.MATRIX, 64 * size) for size in (96, 90, 17, 64, 33)]
    matrices.append(Weight(Kind.MATRIX, 64 * 24, count=19))
    weights = [
        torch.nn.Parameter(torch.empty(weight.elements // 64, 64, device="meta"))
        for weight in matrices
        for _ in range(weight.count)
    ]
    layout = deal(weights, None, ranks, DistributedDataParallelConfig())
    [(start, end)] = layout.bucket_indices
    loads = [0] * ranks
    for first, last, _ in layout.param_index_map.values():
        loads[(first - start) * ranks // (end - start)] += last - first
    asked = Launch(
        num_layers=1,
        padded_vocab_size=1,
        world_size=ranks,
        optimizer="muon",
        use_distributed_optimizer=True,
    )
    assert model_bytes(matrices, asked).optimizer == 8 * max(loads)


@pytest.mark.transformer_engine(only=True)
@pytest.mark.parametrize(
    ("types", "bytes_of_weight"),
    [
        ({}, 10),  # of a weight in fp32, what its bf16 lacks
        ({"store_param_remainders": False}, 12),
        ({"main_params_dtype": "fp16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 6),
        ({"exp_avg_sq_dtype": "fp16"}, 8),
    ],
)
def test_the_precision_aware_optimizers_state(types, bytes_of_weight):
    """Of Transformer Engine's FusedAdam, made as Megatron-Core makes it."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtypes = named | {"fp8": torch.uint8}
    asked = Launch(
        num_layers=1,
        padded_vocab_size=1,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=True,
        **types,
    )
    weight = torch.nn.Parameter(torch.zeros(16, 64, dtype=torch.bfloat16))
    optimizer = FusedAdam(
        [weight],
        exp_avg_dtype=dtypes[asked.exp_avg_dtype],
        exp_avg_sq_dtype=dtypes[asked.exp_avg_sq_dtype],
        master_weights=True,
        use_decoupled_grad=True,
        master_weight_dtype=dtypes[asked.main_params_dtype],
        store_param_remainders=asked.store_param_remainders,
    )
    optimizer.initialize_state(weight, asked.store_param_remainders)
    found = sum(state.nbytes for state in optimizer.state[weight].values())
    estimated = model_bytes([Weight(Kind.MATRIX, weight.numel())], asked).optimizer
    assert estimated == found == bytes_of_weight * weight.numel()
