"""Outputs that would replace what is not a conversion's, or an input: refused and left alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.conversion_runs import assert_refused
from support.conversion_world import RELEASE, World, tree, write_shards
from support.reference import write_hf_folder


def _a_file(direction, folder):
    (folder / "out").write_text("mine")
    return folder / "out", "exists already", "expected a folder with"


def _below_a_file(direction, folder):
    (folder / "file").write_text("mine")
    return folder / "file" / "out", str(folder / "file"), str(folder / "file")


def _another_folder(direction, folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    return folder / "out", "exists already", "expected a folder with"


def _an_empty_folder(direction, folder):
    (folder / "out").mkdir()
    return folder / "out", "exists already", "expected a folder with"


def _a_link(direction, folder):
    shutil.copytree(direction.old, folder / "old")
    (folder / "out").symlink_to(folder / "old")
    return folder / "out", "exists already", "found something else"


def _a_dangling_link(direction, folder):
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out", "exists already", "found something else"


def _in_the_source(direction, folder):
    return folder / "source" / "out", "expected a place apart", "expected a place apart"


def _the_source(direction, folder):
    return folder / "source", "expected a place apart", "expected a place apart"


def _around_the_source(direction, folder):
    return folder, "expected a place apart", "expected a place apart"


def _the_source_by_a_link(direction, folder):
    (folder / "link").symlink_to(folder)
    return folder / "link" / "source", "expected a place apart", "expected a place apart"


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize(
    "place",
    [
        _a_file,
        _below_a_file,
        _another_folder,
        _an_empty_folder,
        _a_link,
        _a_dangling_link,
        _in_the_source,
        _the_source,
        _around_the_source,
        _the_source_by_a_link,
    ],
)
def test_place_is_refused_and_left_alone(direction, tmp_path, place, overwrite):
    shutil.copytree(direction.source, tmp_path / "source")
    out, *said = place(direction, tmp_path)
    before = tree(tmp_path)
    options = ["--overwrite"] if overwrite else []
    ended = direction.convert(out, *options, source=tmp_path / "source")
    assert_refused(ended, said[overwrite])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("inside", ["", "sub"], ids=["the folder", "around it"])
@pytest.mark.parametrize("option", ["--hf-dir", "--mtp-from"])
def test_other_inputs_are_never_replaced(world, tmp_path, option, inside):
    """The config's folder and the MTP layers' are inputs too."""
    direction = world.directions["to-hf"]
    target = write_shards(tmp_path / "out", world.config, world.weights)
    used = shutil.copytree(target, target / inside) if inside else target
    source = direction.source
    argv = ["convert", "to-hf", source, target, "--overwrite"]
    if option == "--mtp-from":
        source = _without_mtp(world, tmp_path)
        argv = ["convert", "to-hf", source, target, "--overwrite", "--hf-dir", world.hf]
    before = tree(tmp_path)
    assert_refused(direction.server.run([*argv, option, used]), "expected a place apart")
    assert tree(tmp_path) == before


# Fields of config.json with an entry for each layer, MTP layers included.
LISTS = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


def _without_mtp(world: World, folder: Path) -> Path:
    """A checkpoint of the model without its MTP layers."""
    config = world.config | {"num_nextn_predict_layers": 0}
    for name in LISTS:
        config[name] = config[name][: config["num_hidden_layers"]]
    names = {name for name in world.weights if re.search(r"layers\.[67]\.", name)}
    weights = {name: value for name, value in world.weights.items() if name not in names}
    hf = write_hf_folder(folder / "trained", config, weights)
    server = world.directions["to-megatron"].server
    ended = server.run(["convert", "to-megatron", hf, folder / "without"])
    assert ended.status == 0, ended.text
    # It was trained with the whole model's config, of which it has a part.
    (folder / "without" / RELEASE / "common.pt").unlink()
    return folder / "without"
