"""What is estimated for the published model's ranks, against what Megatron-Core builds of them."""

from __future__ import annotations

import json

import pytest
from support import built_ranks
from support.built_ranks import compare


@pytest.mark.slow
def test_the_published_models_ranks_are_those_that_are_built(tmp_path):
    """In the authors' layout, on the meta device; every parameter of the model is on some rank."""
    built_ranks.make_published(tmp_path)
    [found] = json.loads((tmp_path / "built.json").read_text()).values()
    assert len(found["ranks"]) == 8
    compare(
        found,
        {
            "parameters": "parameters",
            "expert_parameters": "expert_parameters",
            "held": "micro_batches_in_flight",
        },
    )
    embedding_copy = 128896 * 4096
    total = sum(rank["parameters"] + 7 * rank["expert_parameters"] for rank in found["ranks"])
    estimate = found["estimate"]
    assert estimate["total_parameters"] == total - embedding_copy
    assert estimate["total_parameters"] + estimate["buffer_elements"] == 199_384_301_376
