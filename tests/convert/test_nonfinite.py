"""NaN and Inf in the weights, and values that a narrower dtype makes infinite, are reported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from support.conversion_runs import assert_refused
from support.conversion_world import GATE, tree, write_shards

BROKEN = {
    GATE: float("nan"),
    "model.layers.4.moe.down_proj.weight": float("inf"),
    "model.layers.7.transformer.shared_head.output.weight": float("-inf"),
    "model.layers.2.moe.router_bias": float("nan"),
}


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory) -> SimpleNamespace:
    """Weights with a NaN or Inf in one element each, in both layouts."""
    folder = tmp_path_factory.mktemp("broken")
    weights = {name: value.clone() for name, value in world.weights.items()}
    for name, value in BROKEN.items():
        weights[name].view(-1)[-3] = value
    hf = write_shards(folder / "hf", world.config, weights)
    argv = ["convert", "to-megatron", hf, folder / "checkpoint", "--allow-nonfinite"]
    ended = world.directions["to-megatron"].server.run(argv)
    assert ended.status == 0, ended.text
    sources = {"to-megatron": hf, "to-hf": folder / "checkpoint"}
    return SimpleNamespace(weights=weights, hf=hf, sources=sources)


def test_nan_and_inf_are_reported_by_published_names(direction, broken, tmp_path):
    source, out = broken.sources[direction.name], tmp_path / "out"
    ended = direction.convert(out, source=source)
    assert_refused(ended, f"{source}: NaN or Inf in {len(BROKEN)} tensors", "--allow-nonfinite")
    listed = ended.text.split("tensors:\n")[1].split("\nThe model")[0].split()
    assert sorted(listed) == sorted(BROKEN)
    assert tree(out) is None
    # What an earlier run found is not forgotten by the one that goes on with its files.
    again = direction.convert(out, source=source)
    assert_refused(again, "going on:", *BROKEN)
    assert tree(out) is None
    ended = direction.convert(out, "--allow-nonfinite", "--check", source=source)
    assert ended.status == 0 and "bit for bit" in ended.text, ended.text
    if direction.name == "to-hf":
        found = {}
        for path in out.glob("*.safetensors"):
            found |= load_file(path)
        assert {n: t.numpy().tobytes() for n, t in found.items()} == {
            n: t.numpy().tobytes() for n, t in broken.weights.items()
        }


def test_values_that_do_not_fit_the_dtype_are_reported(direction, world, tmp_path):
    weights = {name: value.clone() for name, value in world.weights.items()}
    weights[GATE][2, 3] = -1e5
    source = write_shards(tmp_path / "hf", world.config, weights)
    if direction.name == "to-hf":
        argv = ["convert", "to-megatron", source, tmp_path / "checkpoint"]
        assert direction.server.run(argv).status == 0
        source = tmp_path / "checkpoint"
    out = tmp_path / "out"
    ended = direction.convert(out, "--dtype", "float16", source=source)
    assert_refused(ended, "NaN or Inf in 1 tensors", GATE)
    assert tree(out) is None
    assert direction.convert(out, "--dtype", "bfloat16", source=source).status == 0
