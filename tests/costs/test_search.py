"""Layouts that are found to fit, and their order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.costs.estimate import estimate
from step35_patch.costs.launch import Launch, stages
from step35_patch.costs.search import OPTIONS, Found, best_of_sizes, search

GIB = 2**30


@pytest.fixture(scope="module")
def published() -> Step35Config:
    return Step35Config.from_pretrained(packaged_config_path())


@pytest.fixture(scope="module")
def authors_run() -> Launch:
    """Their batch and optimizer; no layout yet."""
    return Launch(
        num_layers=45,
        padded_vocab_size=128896,
        mtp_num_layers=3,
        seq_length=131072,
        global_batch_size=32,
        optimizer="muon",
    )


@pytest.fixture(scope="module")
def fitting(published, authors_run) -> list[Found]:
    return search(published, authors_run, gpus=64, memory=80 * GIB)


@pytest.mark.slow
def test_the_authors_layout_is_among_those_for_64_gpus(fitting, authors_run):
    [found] = [
        one
        for one in fitting
        if one.launch.pipeline_model_parallel_size == 8
        and one.launch.context_parallel_size == 8
        and one.launch.expert_model_parallel_size == 8
        and one.launch.virtual_pipeline_model_parallel_size == 3
    ]
    launch = found.launch
    assert found in best_of_sizes(fitting)
    assert launch.tensor_model_parallel_size == launch.expert_tensor_parallel_size == 1
    theirs = replace(launch, pipeline_model_parallel_layout="Ett|(tt|)*21t|mmmL")
    assert stages(launch) == stages(theirs)
    # 142 GB without these: logits in fp32 and the whole optimizer on the last stage.
    assert found.needs == OPTIONS[:3]


@pytest.mark.slow
def test_what_is_found_fits_and_needs_what_is_said(published, fitting):
    scores = [one.score for one in fitting]
    assert scores == sorted(scores)
    for one in fitting[::10]:
        found = estimate(published, one.launch)
        assert found.memory == one.memory <= 80 * GIB
        undone = {
            "--use-distributed-optimizer": {"use_distributed_optimizer": False},
            "--grad-reduce-in-bf16": {"accumulate_allreduce_grads_in_fp32": True},
            OPTIONS[1]: {"recompute_granularity": None},
            OPTIONS[2]: {"cross_entropy_loss_fusion": False},
        }
        if one.needs:
            without = estimate(published, replace(one.launch, **undone[one.needs[-1]]))
            assert without.memory > 80 * GIB


def test_with_less_memory_less_fits_and_needs_more(published, authors_run):
    """On eight GPUs with short sequences, where there is little to try."""
    short = replace(authors_run, seq_length=4096, global_batch_size=8, optimizer="adam")
    many, few, none = (
        search(published, short, gpus=8, memory=gib * GIB) for gib in (1000, 405, 100)
    )
    assert len(many) > len(few) > len(none) == 0
    assert any(not one.needs for one in many)
    assert all(one.needs for one in few)


def test_options_that_are_given_are_not_asked_for(published, authors_run):
    given = replace(
        authors_run,
        seq_length=4096,
        global_batch_size=8,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        use_distributed_optimizer=True,
    )
    for one in search(published, given, gpus=8, memory=600 * GIB):
        assert not {*OPTIONS[:2]} & {*one.needs}
