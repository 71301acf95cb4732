"""Layouts, read and divided without Megatron-Core, against its own parser and checks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from support.reference import tiny_config

from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.costs.estimate import estimate
from step35_patch.costs.launch import Launch, LaunchError, Stage, stages
from step35_patch.costs.pipeline_letters import layers_of_stages, virtual_size_of

# Text, pipeline-parallel size, decoder and MTP layers; whether Megatron-Core accepts it.
LAYOUTS = {
    ("Ett|tt|tt|ttL", 4, 8, 0): True,
    ("Ett|(tt|)*2,ttL", 4, 8, 0): True,
    ("E(t|)*7tL", 4, 8, 0): True,
    ("Et*4|t*4mL", 2, 8, 1): True,
    ("Ett|(tt|)*21t|mmmL", 8, 45, 3): True,
    ("E|tttt|ttttmm|L", 4, 8, 2): True,
    ("Ett||tttttt|L", 4, 8, 0): True,
    ("E|*2t*8|L", 4, 8, 0): True,
    ("Ett|tt|tt|tt|L", 4, 8, 0): False,  # five stages
    ("Ett|tt|tt|tL", 4, 8, 0): False,  # a layer too few
    ("ttE|tt|tt|ttL", 4, 8, 0): False,
    ("Ett|tt|Ltt|tt", 4, 8, 0): False,
    ("Ett|EttL|tt|ttL", 4, 8, 0): False,
    ("Ett|tt|ttm|ttL", 4, 8, 1): False,  # a decoder layer behind an MTP layer
    ("Ett|tt|ttttm|mL", 4, 8, 2): False,  # MTP layers apart
    ("Ettttttttm|L|", 1, 8, 1): False,  # nothing behind the loss
    ("Ett|tt|xx|ttL", 4, 8, 0): False,
    ("Ett|(tt|*2ttL", 4, 8, 0): False,
    ("Et*4|t*4L", 2, 8, 1): False,  # an MTP layer too few
    ("", 1, 8, 0): False,
}


@pytest.mark.megatron
@pytest.mark.parametrize(("layout", "legal"), LAYOUTS.items())
def test_pipeline_letters_are_read_as_megatron_reads_them(layout, legal):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    letters, size, layers, mtp = layout

    def megatrons() -> list[tuple[int, int]]:
        parsed = PipelineParallelLayerLayout(letters, size)
        parsed.validate_layer_layout(layers, mtp)
        by_chunk = zip(*parsed.layout, strict=True)
        return [
            (part.count(LayerType.decoder), part.count(LayerType.mtp))
            for chunk in by_chunk
            for part in chunk
        ]

    if legal:
        assert layers_of_stages(letters, size, layers, mtp) == megatrons()
        return
    with pytest.raises((AssertionError, IndexError)):
        megatrons()
    with pytest.raises(LaunchError, match="--pipeline-model-parallel-layout: expected"):
        layers_of_stages(letters, size, layers, mtp)


@pytest.mark.parametrize("letters", ["Et*9999999999L", "E(t)*99999L", "E(t*9999)*9999L"])
def test_endless_repetitions_are_refused(letters):
    with pytest.raises(LaunchError, match="no more than 10000 letters"):
        virtual_size_of(letters, 1)


@pytest.fixture(scope="module")
def published() -> Step35Config:
    return Step35Config.from_pretrained(packaged_config_path())


@pytest.fixture
def authors() -> Launch:
    """The authors' layout on 64 GPUs."""
    return Launch(
        num_layers=45,
        padded_vocab_size=128896,
        mtp_num_layers=3,
        world_size=64,
        pipeline_model_parallel_size=8,
        virtual_pipeline_model_parallel_size=3,
        pipeline_model_parallel_layout="Ett|(tt|)*21t|mmmL",
        context_parallel_size=8,
        expert_model_parallel_size=8,
        seq_length=131072,
        global_batch_size=32,
        optimizer="muon",
    )


def test_stages_of_the_authors_layout(authors):
    found = stages(authors)
    assert found[0] == Stage(pp=0, vpp=0, decoder_layers=(0, 1), embedding=True)
    assert found[17] == Stage(pp=1, vpp=2, decoder_layers=(34, 35))
    assert found[-1] == Stage(pp=7, vpp=2, mtp_layers=(45, 46, 47), output=True)
    assert [layer for stage in found for layer in stage.layers] == list(range(48))


def test_a_model_without_experts_needs_nothing_that_experts_do():
    """Also one whose use_moe is true, as it is where nothing is said."""
    config = Step35Config.from_dict(tiny_config(moe_layers_enum=[], moe_num_experts=...))
    launch = Launch(
        num_layers=6, padded_vocab_size=96, mtp_num_layers=2, world_size=2, global_batch_size=8
    )
    assert estimate(config, replace(launch, tensor_model_parallel_size=2)).memory
    with pytest.raises(LaunchError, match="-size: expected 1 for a model without experts"):
        estimate(config, replace(launch, expert_model_parallel_size=2))


# Changes of the authors' layout; the argument that is named, and a word of what is said of it.
WRONG = [
    ({"world_size": 60}, "--tensor-model-parallel-size", "divides 60 processes"),
    ({"world_size": 0}, "WORLD_SIZE", "positive"),
    ({"expert_model_parallel_size": 7, "world_size": 448}, "--expert-model-parallel-size", "288"),
    ({"tensor_model_parallel_size": 16, "world_size": 1024}, "--tensor-model", "groups=8"),
    ({"tensor_model_parallel_size": 2, "world_size": 128}, "--sequence-parallel", "experts"),
    ({"seq_length": 131073}, "--seq-length", "2 x --context-parallel-size = 16"),
    ({"global_batch_size": 12}, "--global-batch-size", "groups of 8"),
    ({"global_batch_size": 4}, "--global-batch-size", "groups of 8"),
    ({"micro_batch_size": 5}, "--global-batch-size", "5 x 1"),
    ({"mtp_num_layers": 4}, "--mtp-num-layers", "0 to 3"),
    ({"num_layers": 44}, "--num-layers", "45"),
    ({"padded_vocab_size": 128000}, "--padded-vocab-size", "128896"),
    ({"optimizer": "adamax"}, "--optimizer", "adam"),
    ({"recompute_modules": ("attention",)}, "--recompute-modules", "core_attn"),
    ({"use_precision_aware_optimizer": True}, "--use-precision-aware", "adam"),
    ({"pipeline_model_parallel_layout": "Ett|(tt|)*21t|mmL"}, "--pipeline-model", "3 MTP"),
    ({"pipeline_model_parallel_layout": None}, "--pipeline-model-parallel-size", "a divisor of 45"),
    (
        {"pipeline_model_parallel_layout": None, "pipeline_model_parallel_size": 10**12},
        "--pipeline-model-parallel-size",
        "at most 47 stages",
    ),
]


@pytest.mark.parametrize(("changes", "argument", "word"), WRONG)
def test_what_cannot_be_laid_out_is_said(published, authors, changes, argument, word):
    with pytest.raises(LaunchError) as error:
        estimate(published, replace(authors, **changes))
    lines = [str(one) for one in error.value.problems if one.argument.startswith(argument)]
    assert any(word in line for line in lines) and not any("\n" in line for line in lines)


def test_all_problems_are_said_at_once(published, authors):
    with pytest.raises(LaunchError) as error:
        estimate(published, replace(authors, world_size=60, mtp_num_layers=2, optimizer="adamax"))
    assert len(error.value.problems) >= 4  # the layout has three MTP layers


def test_a_copy_of_the_embedding_beside_it_is_refused(published, authors):
    two = replace(
        authors,
        world_size=128,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout="Et*15|t*15|t*15mmm|L",
    )
    with pytest.raises(LaunchError, match="MTP layers beside the embedding"):
        estimate(published, two)


def test_an_estimate_needs_no_torch():
    code = """
import sys
from step35_patch.cli import main
words = ["estimate", "step-3.5-flash", "--pp", "8", "--pipeline-layout", "Ett|(tt|)*21t|mmmL"]
assert main([*words, "--json"]) == 0
assert not {"torch", "megatron", "rich"} & {*sys.modules}, "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
