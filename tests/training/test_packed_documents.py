"""Packed documents through Megatron-LM's own pretrain_gpt.py train as each of them does alone.

`--sft` on conversations and `--dataloader-inter-document-masking` on an indexed data set, with a
real tokenizer, in the layouts that cut a pack; the oracle is transformers' model, trained on one
document at a time. The checkouts are named as in test_pretrain_gpt.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import packed_runs
from support.layout_runs import assert_same_training, iterations
from support.packed_runs import batches, packs, run_script, sft_arguments, trained_apart

VARIABLE = "STEP35_TEST_MEGATRON_LM"
CHECKOUTS = [Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.transformer_engine,
    pytest.mark.skipif(
        not CHECKOUTS, reason=f"{VARIABLE} names no checkout of Megatron-LM (core_v0.17.1, ...)"
    ),
]

# Name: (processes, arguments)
LAYOUTS = {
    "one process": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    # A stage between has neither tokens nor labels, only where documents begin.
    "tp2 pp3": (
        6,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 3",
    ),
    # On Transformer Engine each layer communicates in its own way.
    "cp2": (
        2,
        "--context-parallel-size 2 --calculate-per-token-loss "
        "--cp-comm-type p2p a2a all_gather a2a p2p all_gather",
    ),
    # The last stage has no MTP layers, for which it would get the tokens.
    "tp2 pp2, no mtp": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--mtp-num-layers 0",
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return packed_runs.write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return packed_runs.write_indexed(tmp_path_factory.mktemp("indexed"))


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    """Hugging Face's datasets keep what they read."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _train(checkout, start, *more: str, layout: str):
    config, load = start
    processes, words = LAYOUTS[layout]
    output = run_script(checkout, config, *load, *more, *words.split(), processes=processes)
    return iterations(output)


@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations(checkout, layout, start):
    """All tokens are predicted, by a document's last one even the next one's first, if let."""
    pytest.importorskip("datasets")
    found = _train(checkout, start, *sft_arguments(), layout=layout)
    cut = layout == "cp2"
    expected = trained_apart(
        batches(packs(granularity=4 if cut else 1)), mtp="no mtp" not in layout, per_token=cut
    )
    assert_same_training(found, expected)


@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_answers_alone_are_predicted(checkout, start):
    pytest.importorskip("datasets")
    name = "nemotron-h-aligned"
    found = _train(checkout, start, *sft_arguments(name), layout="one process")
    assert_same_training(found, trained_apart(batches(packs(name))))


@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
@pytest.mark.parametrize("layout", ["one process", "tp2 pp3", "cp2"])
def test_indexed_documents(checkout, layout, start, indexed, tmp_path):
    if any(old in checkout.name for old in ("0.17", "0.18")):
        pytest.skip("--dataloader-inter-document-masking is new in Megatron-Core 0.19")
    options = packed_runs.document_arguments(indexed, tmp_path / "theirs")
    found = _train(checkout, start, *options, layout=layout)
    cut = layout == "cp2"
    found_packs = packed_runs.sampled_packs(indexed, tmp_path / "ours", 4 if cut else 1)
    expected = trained_apart(batches(found_packs), per_token=cut)
    assert_same_training(found, expected)
