"""Ranks with Megatron-Bridge, and the folder that they begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.bridge_processes import environment
from support.ranks import Ranks
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder
from support.tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def bridge_ranks(tmp_path_factory) -> Iterator[Ranks]:
    """Ranks that have `support.bridge_worker` imported."""
    folder = tmp_path_factory.mktemp("bridge-ranks")
    ranks = Ranks(folder, "from support import bridge_worker", environment())
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A folder in the published layout, with tokens [2, 24] in tokens.pt.

    Its vocabulary of 97 is divided by no layout.
    """
    config = tiny_config(vocab_size=97, architectures=["Step3p5ForCausalLM"])
    folder = tmp_path_factory.mktemp("published")
    write_hf_folder(folder, config, random_weights(config, 17))
    write_tokenizer(folder, 97)
    tokens, _ = random_tokens(17, 2, 24)
    torch.save(tokens, folder / "tokens.pt")
    return folder
