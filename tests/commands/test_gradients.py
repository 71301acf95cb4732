"""`step35-patch verify --gradients`: what it makes of a layout and a config, and what it prints."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from support.layout_runs import write_config

from step35_patch import cli
from step35_patch.commands.gradients import GradientsError, differences, read_layout

WORDS = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
    "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --recompute-modules moe mlp "
    "--calculate-per-token-loss --moe-z-loss-coeff 0.1"
)


def test_one_process_gets_what_is_not_of_the_layout():
    layout = read_layout(WORDS.split(), None)
    assert layout.others == ["--calculate-per-token-loss", "--moe-z-loss-coeff", "0.1"]
    assert layout.arguments == WORDS.split()
    assert (layout.processes, layout.replicas) == (8, 2)
    assert read_layout(WORDS.split(), 16).replicas == 4
    with pytest.raises(GradientsError, match="expected a multiple of 8, found 12"):
        read_layout(WORDS.split(), 12)
    with pytest.raises(GradientsError, match="--bf16: gradients are compared in fp32"):
        read_layout(["--bf16"], None)


def test_worst_gradient_is_named(tmp_path):
    def write(name: str, **tensors: torch.Tensor) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)

    wanted = {name: torch.tensor([1.0, -4.0]) for name in "abcd"}
    write("one/rank-0.safetensors", **wanted)
    write("two/rank-0.safetensors", a=wanted["a"], b=wanted["b"] + 0.4)
    write("two/rank-1.safetensors", b=wanted["b"] - 2.0, c=torch.tensor([1.0, math.nan]))
    found = {x.name: (x.rank, x.largest) for x in differences(tmp_path / "one", tmp_path / "two")}
    assert found == {"c": (1, math.inf), "d": (None, math.inf), "b": (1, 0.5), "a": (0, 0.0)}
    assert list(found)[2:] == ["b", "a"]


@pytest.mark.slow
def test_layout_agrees(tmp_path, capsys):
    write_config(tmp_path)
    words = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--overlap-grad-reduce"]
    status = cli.main(["verify", "--gradients", str(tmp_path), "--", *words])
    printed = capsys.readouterr()
    assert status == 0, printed
    assert "AGREE: " in printed.out and "mtp_2 loss" in printed.out


def test_layout_is_for_gradients_only(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path), "--", "--sequence-parallel"]) == 2
    assert "expected none without --gradients" in capsys.readouterr().err
