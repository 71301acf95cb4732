"""Training, not only one step: against transformers with torch's AdamW and an independent Muon, and
one gate layout against the other."""

from __future__ import annotations

import pytest
import torch
from support.figures import record
from support.training_curve import (
    ADAM,
    AUTHORS,
    Recipe,
    differences,
    train_ours,
    train_reference,
    write_folder,
)

from step35_patch.checkpoint import published_tensors_of


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small operations: threads that wait for each other take minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "steps"), [(ADAM, 200), (AUTHORS, 100)], ids=["adam", "authors"]
)
def test_iterations_follow_the_reference(tmp_path, recipe, steps):
    folder, config, weights = write_folder(tmp_path / "hf")
    _, ours = train_ours(recipe, folder, steps)
    theirs = train_reference(recipe, config, weights, steps)
    assert theirs[-1].loss < 0.6 * theirs[0].loss
    apart = differences(ours, theirs)
    assert max(apart) < 1e-3, [(step, d) for step, d in enumerate(apart) if d >= 1e-3]
    record("training losses", max(apart))


def _trained(
    recipe: Recipe, folder, gate_layout: str
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model, _ = train_ours(recipe, folder, 20, gate_layout=gate_layout)
    return model, {name: tensor.clone() for name, tensor in published_tensors_of(model)}


def _largest_difference(found, wanted) -> float:
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


@pytest.mark.parametrize("recipe", [ADAM, AUTHORS], ids=["adam", "authors"])
def test_gate_layouts_train_alike(tmp_path, recipe):
    """20 steps with clipping and weight decay leave the same weights, and rows still tied."""
    folder, _, weights = write_folder(tmp_path / "hf")
    _, headwise = _trained(recipe, folder, "headwise")
    model, expanded = _trained(recipe, folder, "expanded")
    moved = _largest_difference(headwise, weights)
    assert moved > 2e-3
    assert _largest_difference(expanded, headwise) < 5e-4 * moved
    for name, tensor in model.state_dict().items():
        if name.endswith("linear_qkv.weight"):
            layer = model.get_submodule(name.removesuffix(".linear_qkv.weight"))
            rows = layer.tied_gate_rows(tensor)
            assert torch.equal(rows, rows[:, :, :1].expand_as(rows)), name
