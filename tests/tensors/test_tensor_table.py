"""The one table of tensors: nobody else knows a tensor by name, and a rank's share adds up."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
from support.reference import tiny_config

import step35_patch
from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.tensors import megatron
from step35_patch.tensors.megatron import MegatronTensor, extra_states, megatron_tensors
from step35_patch.tensors.table import Cut, tensor_table

# What only the names of tensors have in them: published ones, and the keys of Megatron checkpoints.
NAMES = re.compile(
    r"[qkvog]_proj|(gate|up|down)_proj|eh_proj|shared_head|share_expert\.|moe\.gate|\brouter_bias"
    r"|lm_head|embed_tokens|word_embeddings|linear_(qkv|proj|fc1|fc2)\.|transformer_layer\."
    r"|model\.(layers|norm)\.|(decoder|mtp)\.layers\.|[qk]_norm\.|final_layernorm\."
)
# Module: what it says of tensors, and why.
SPOKEN_OF_ELSEWHERE = {
    "tensors/table.py": "the table",
    "tensors/spelling.py": "transformers' own names for stored tensors, beside the published ones",
    "verify/reference.py": "transformers' own names for the reference's modules",
    "model/experimental_hybrid.py": "a HybridModel's keys beside a GPTModel's",
}


def _texts(file: Path) -> list[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse(file.read_text())
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documented
    ]


def test_names_of_tensors_stand_in_the_table_alone():
    package = Path(step35_patch.__file__).parent
    found = {
        str(file.relative_to(package)): names
        for file in sorted(package.rglob("*.py"))
        if (names := [t for t in _texts(file) if " " not in t.strip() and NAMES.search(t)])
    }
    table = (package / "tensors" / "table.py").read_text()
    assert NAMES.search(table), "the pattern finds nothing where the names are"
    elsewhere = {file: names for file, names in found.items() if file not in SPOKEN_OF_ELSEWHERE}
    assert elsewhere == {}
    assert set(SPOKEN_OF_ELSEWHERE) <= set(found), "a module is excused that names no tensor"


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
@pytest.mark.parametrize(("tensor", "expert", "expert_tensor"), [(1, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_what_the_ranks_hold_adds_up(gate_layout, tensor, expert, expert_tensor):
    """All ranks of a stage together hold each weight once, and what is whole on each of them."""
    config = Step35Config.from_pretrained(packaged_config_path())
    for row in tensor_table(config, gate_layout):
        own = row.elements_on_rank(tensor=tensor, expert=expert, expert_tensor=expert_tensor)
        assert isinstance(own, int), "a number of elements is printed as one"
        ranks = expert * expert_tensor if row.is_expert else tensor
        assert own * ranks == row.num_elements * (ranks if row.cut is Cut.WHOLE else 1), row.key


def test_the_published_table_is_the_published_model():
    """804 published tensors make up the model's 199,384,301,376 numbers, each of them once."""
    config = Step35Config.from_pretrained(packaged_config_path())
    rows = tensor_table(config, "headwise")
    published = [tensor.name for row in rows for tensor in row.published]
    assert len(published) == len(set(published)) == 804
    assert sum(row.num_elements for row in rows) == 199_384_301_376
    expanded = sum(row.num_elements for row in tensor_table(config, "expanded"))
    assert expanded - 199_384_301_376 == 2_197_291_008


def test_a_row_is_as_large_as_what_it_is_made_of():
    config = Step35Config.from_dict(tiny_config())
    for row in tensor_table(config, "headwise"):
        size = sum(math.prod(tensor.shape) for tensor in row.published)
        assert row.num_elements == size, row.key


def _published_rows(tensor: MegatronTensor) -> dict[tuple[int, ...], tuple[str, int]]:
    """For each row of a tensor, by its place, the published tensor and the element it begins at."""
    found = {}
    for chunk in tensor.chunks:
        rows_at = max(0, len(chunk.sizes) - 2)
        place, first = list(chunk.offsets), chunk.offsets[rows_at]
        for run in chunk.runs:
            for row in range(run.rows):
                place[rows_at] = first + row
                assert tuple(place) not in found, tensor.key
                found[tuple(place)] = run.name, run.start + row // run.repeat * run.row
            first += run.rows
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_runs_of_bounded_size_are_the_same_rows(monkeypatch, rows):
    """What is too large for one run, as the vocabulary of the published model, is cut into more."""
    config = Step35Config.from_dict(tiny_config())
    whole = megatron_tensors(config, "headwise")
    monkeypatch.setattr(megatron, "_MAX_RUN", rows * config.hidden_size)
    cut = megatron_tensors(config, "headwise")
    assert sum(len(tensor.chunks) for tensor in cut) > 3 * sum(len(t.chunks) for t in whole)
    for one, many in zip(whole, cut, strict=True):
        assert _published_rows(one) == _published_rows(many), one.key
        size = sum(math.prod(chunk.sizes) for chunk in many.chunks)
        assert size == math.prod(many.shape), one.key


def test_extra_states_keep_their_order():
    """Which is in a converted checkpoint's metadata: another one would make other bytes."""
    config = Step35Config.from_dict(tiny_config())
    modules = [key.removesuffix("._extra_state/shard_0_1") for key in extra_states(config)]
    dense = [
        m.removeprefix("decoder.layers.0.") for m in modules if m.startswith("decoder.layers.0.")
    ]
    attention = [
        f"self_attention.{n}" for n in "linear_qkv linear_proj q_layernorm k_layernorm".split()
    ]
    assert dense == [*attention, "mlp.linear_fc1", "mlp.linear_fc2"]
    moe = [
        m.removeprefix("decoder.layers.2.") for m in modules if m.startswith("decoder.layers.2.")
    ]
    shared = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    experts = [
        f"mlp.experts.experts.linear_{linear}._extra_state/shard_{expert}_4"
        for linear in ("fc1", "fc2")
        for expert in range(4)
    ]
    assert moe == [*attention, "pre_mlp_layernorm", *shared, *experts]
    around = [f"mtp.layers.0.{n}" for n in "enorm hnorm eh_proj final_layernorm".split()]
    first = modules.index("mtp.layers.0.enorm")
    assert modules[first : first + 5] == [*around, "mtp_output_layers.0"]
    assert modules[-1] == "decoder.final_layernorm"
