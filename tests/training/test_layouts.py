"""Training is the same under every parallel layout: the example script, torchrun, gloo.

Each layout starts from one checkpoint and trains 20 iterations on the same data; losses, MTP losses
and gradient norms are those of the run with one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import layout_runs
from support.figures import record
from support.layout_runs import (
    ITERATIONS,
    LAYOUTS,
    MUON,
    ForkedRuns,
    Iteration,
    arguments,
    assert_same_training,
    checkpoint_tensors,
    iterations,
    on_engine,
    run,
)
from support.once import once
from support.reference import random_weights, write_hf_folder

from step35_patch import Step35Config
from step35_patch.convert import Options, convert_to_hf, convert_to_megatron

pytestmark = pytest.mark.slow
# With each Megatron-Core. The others run with the newest only.
every_version = pytest.mark.megatron

# Where Muon's matrices are cut, or lie elsewhere. "tp2" is in the test of its checkpoints.
MUON_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("vpp", "cp2", "tp2 ep2 etp1")},
    # Megatron-Core's Muon knows its distributed optimizer in bf16 only: see below.
    "dp2": (2, ""),
}
# Started by a torchrun, as users do; the others' ranks are forked, which is quicker.
TORCHRUN = ("tp2",)

Run = Callable[..., str]


class Start:
    """The config, the checkpoint that all runs start from, and the run with one process."""

    def __init__(self, folder):
        self.config = folder / "config.json"
        self.checkpoint = folder / "start"

    def make(self, train: Run) -> None:
        layout_runs.write_config(self.config.parent)
        train(
            self.config,
            *arguments(iterations=2),
            *("--save", str(self.checkpoint), "--save-interval", "2"),
        )
        self._log().write_text(train(self.config, *arguments(), *self.load()))
        assert sorted(self.expected) == list(range(1, ITERATIONS + 1))

    def _log(self) -> Path:
        return self.config.with_name("log")

    @property
    def expected(self) -> dict[int, Iteration]:
        """What the run with one process logged."""
        return iterations(self._log().read_text())

    def load(self) -> list[str]:
        """Arguments that start from the checkpoint's weights, at iteration 0."""
        return [
            *("--load", str(self.checkpoint), "--exit-on-missing-checkpoint"),
            *("--finetune", "--no-load-optim", "--no-load-rng"),
        ]


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Iterator[Run]:
    runs = ForkedRuns(tmp_path_factory.mktemp("runs"))
    yield runs.run
    runs.ranks.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory, train):
    return Start(once(tmp_path_factory, "start", lambda folder: Start(folder).make(train)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(start, train, name):
    processes, layout = LAYOUTS[name]
    launch = run if name in TORCHRUN else train
    output = launch(start.config, *arguments(), *start.load(), *layout.split(), processes=processes)
    assert_same_training(iterations(output), start.expected)


@pytest.fixture(scope="module")
def muon(tmp_path_factory, start, train):
    """What the run with one process logs with Muon."""

    def make(folder: Path) -> None:
        output = train(start.config, *arguments(), *start.load(), *MUON)
        (folder / "log").write_text(output)

    return iterations((once(tmp_path_factory, "muon", make) / "log").read_text())


@pytest.mark.parametrize("name", MUON_LAYOUTS)
def test_layout_with_muon(start, train, muon, name):
    processes, layout = MUON_LAYOUTS[name]
    words = [*arguments(), *start.load(), *MUON, *layout.split()]
    found = iterations(train(start.config, *words, processes=processes))
    assert_same_training(found, muon)
    assert abs(muon[ITERATIONS].loss / start.expected[ITERATIONS].loss - 1) > 1e-3


def test_muon_resumes_bit_for_bit(start, train, muon, tmp_path):
    """Its momenta too; trained as with one process, saved and loaded under TP2."""
    half, saved = ITERATIONS // 2, tmp_path / "saved"
    words = [*LAYOUTS["tp2"][1].split(), *MUON, *arguments(), "--save-interval", str(half)]
    first = train(start.config, *words, *start.load(), "--save", str(saved), processes=2)
    assert_same_training(iterations(first), muon)
    resume = ["--load", str(saved), "--ckpt-step", str(half), "--exit-on-missing-checkpoint"]
    train(start.config, *words, *resume, "--save", str(tmp_path / "again"), processes=2)
    found = checkpoint_tensors(tmp_path / "again", ITERATIONS)
    wanted = checkpoint_tensors(saved, ITERATIONS)
    momenta = [name for name in wanted if "momentum_buffer" in name]
    assert any("linear_qkv" in name for name in momenta)
    assert any("experts" in name for name in momenta)
    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    record("identical tensors", len(wanted))


def test_muon_of_a_distributed_optimizer(start, train):
    """Megatron-Core's layer-wise one: each rank has the whole of some matrices."""
    words = [*arguments(), *start.load(), *MUON, "--bf16"]
    wanted = iterations(train(start.config, *words, processes=2))
    distributed = ["--use-distributed-optimizer", "--overlap-grad-reduce"]
    distributed += ["--overlap-param-gather"]
    found = iterations(train(start.config, *words, *distributed, processes=2))
    # Sums of bf16 gradients are taken in another order.
    for number, wanted_iteration in wanted.items():
        assert abs(found[number].loss / wanted_iteration.loss - 1) < 2e-4, number


def test_checkpoint_is_resharded_and_resumed(start, train, tmp_path):
    """Saved under TP2, loaded under TP2, PP2 and by one process: training goes on alike."""
    saved = tmp_path / "tp2"
    tp2 = LAYOUTS["tp2"][1].split()
    half = ITERATIONS // 2
    save = ["--save", str(saved), "--save-interval", str(half)]
    first = iterations(train(start.config, *arguments(), *start.load(), *tp2, *save, processes=2))
    assert_same_training(first, start.expected)
    resume = ["--load", str(saved), "--ckpt-step", str(half), "--exit-on-missing-checkpoint"]

    # The same layout: bit for bit, in the log and in every tensor that is saved at the end.
    # (Megatron logs the mean of the first two losses at the second iteration after a start.)
    over = ["--save", str(tmp_path / "again"), "--save-interval", str(half)]
    again = iterations(train(start.config, *arguments(), *tp2, *resume, *over, processes=2))
    assert sorted(again) == list(range(half + 1, ITERATIONS + 1))
    for number in set(again) - {half + 2}:
        assert again[number] == first[number]
    found = checkpoint_tensors(tmp_path / "again", ITERATIONS)
    wanted = checkpoint_tensors(saved, ITERATIONS)
    assert set(found) == set(wanted) and any("exp_avg_sq" in name for name in wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    record("identical tensors", len(wanted))

    # Other layouts, optimizer's state included.
    rest = {n: it for n, it in start.expected.items() if n > half and n != half + 2}
    for processes, layout in ((1, ""), LAYOUTS["pp2"]):
        other = iterations(
            train(start.config, *arguments(), *layout.split(), *resume, processes=processes)
        )
        del other[half + 2]
        assert_same_training(other, rest)


@every_version
def test_converted_checkpoint_trains_alike(start, train, tmp_path):
    """From Megatron's own checkpoint, optimizer's state in it, to the published layout and back."""
    convert_to_hf(start.checkpoint, tmp_path / "hf", hf_dir=start.config.parent)
    convert_to_megatron(tmp_path / "hf", tmp_path / "converted", options=Options(file_bytes=50_000))
    # What --load takes without --finetune: a release starts at iteration 0 by itself.
    load = ["--load", str(tmp_path / "converted"), "--exit-on-missing-checkpoint"]
    for processes, layout in ((1, ""), LAYOUTS["tp2"]):
        output = train(start.config, *arguments(), *load, *layout.split(), processes=processes)
        assert_same_training(iterations(output), start.expected)
    with pytest.raises(RuntimeError, match="gate layout: headwise in the checkpoint, expanded"):
        train(start.config, *arguments(), *load, "--step35-gate-layout", "expanded")


def test_training_without_mtp_layers(start, train, tmp_path):
    """From a checkpoint that has them and from one that has not; resumed, and exported."""
    hf, saved, back = (tmp_path / name for name in ("hf", "saved", "back"))
    convert_to_hf(start.checkpoint, hf, hf_dir=start.config.parent)
    convert_to_megatron(hf, tmp_path / "all")
    convert_to_megatron(hf, tmp_path / "decoder", without_mtp=True)

    def trained(load: Path, *more: str) -> dict[int, Iteration]:
        words = ["--mtp-num-layers", "0", "--load", str(load), "--exit-on-missing-checkpoint"]
        return iterations(train(start.config, *arguments(4), *words, *more))

    found = trained(tmp_path / "all", "--save", str(saved), "--save-interval", "2")
    assert abs(found[1].loss / start.expected[1].loss - 1) < 2e-5
    assert start.expected[1].mtp_losses and not found[1].mtp_losses
    assert trained(tmp_path / "decoder") == found
    assert trained(saved, "--ckpt-step", "2")[3] == found[3]
    with pytest.raises(ValueError, match="--without-mtp"):
        convert_to_hf(saved, back, hf_dir=hf)
    convert_to_hf(saved, back, hf_dir=hf, without_mtp=True)
    assert Step35Config.from_pretrained(back).num_nextn_predict_layers == 0
    convert_to_megatron(back, tmp_path / "again")  # nothing is missing from it

    # The other way round they would have no values.
    words = ["--load", str(tmp_path / "decoder"), "--exit-on-missing-checkpoint"]
    with pytest.raises(
        RuntimeError, match="has 0 MTP layers, this run builds 2: give it --mtp-num"
    ):
        train(start.config, *arguments(2), *words)


def test_padded_vocabulary_trains_alike(start, train):
    """Losses and gradient norms of the unpadded model; the last rank has most of the padding."""
    processes, layout = LAYOUTS["tp2"]
    padding = ["--padded-vocab-size", "410"]
    output = train(
        start.config, *arguments(4), *start.load(), *layout.split(), *padding, processes=processes
    )
    assert "154 padded columns masked" in output
    assert_same_training(iterations(output), {n: start.expected[n] for n in range(1, 5)})


def test_expanded_gate_is_saved_and_resharded(start, train, tmp_path):
    saved = tmp_path / "expanded"
    expanded = ["--step35-gate-layout", "expanded"]
    save = ["--save", str(saved), "--save-interval", "4"]
    train(start.config, *arguments(4), *expanded, *save)
    weights = ["--load", str(saved), "--finetune", "--no-load-optim", "--no-load-rng"]
    weights += [*expanded, "--exit-on-missing-checkpoint"]
    alone = iterations(train(start.config, *arguments(6), *weights))
    tp2 = iterations(
        train(start.config, *arguments(6), *weights, *LAYOUTS["tp2"][1].split(), processes=2)
    )
    assert_same_training(tp2, alone)


def test_checkpoint_of_another_model_is_refused(start, train, tmp_path):
    document = json.loads(start.config.read_text())
    changed = tmp_path / "config.json"
    changed.write_text(json.dumps(document | {"swiglu_limits": None}))
    for config, more, message in (
        (start.config, ["--step35-window", "steptron"], "window: hf in the checkpoint, steptron"),
        (
            changed,
            [],
            r"swiglu_limits: 0.3 in the checkpoint, null in this run \(layers 3\); .*"
            "--step35-accept-changed swiglu_limits",
        ),
        (start.config, ["--step35-gate-layout", "expanded"], "gate layout: headwise in the"),
        (
            start.config,
            ["--step35-accept-changed", "rope_theta"],
            "rope_theta: expected a field that differs, found none",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            train(config, *arguments(2), *start.load(), *more)


def test_checkpoint_of_another_config_is_accepted_by_field(start, train, tmp_path):
    """And the run that it started goes on from its own checkpoint, with the same arguments."""
    changed, saved = tmp_path / "config.json", tmp_path / "saved"
    document = json.loads(start.config.read_text())
    changed.write_text(json.dumps(document | {"rope_theta": 1000.0}))
    save = ["--save", str(saved), "--save-interval", "2"]
    accept = ["--step35-accept-changed", "rope_theta"]
    output = train(changed, *arguments(2), *start.load(), *save, *accept)
    assert "is of another config, as accepted:" in output
    assert "rope_theta: 50.0 in the checkpoint, 1000.0 in this run (layers 0,4)" in output
    resume = ["--load", str(saved), "--exit-on-missing-checkpoint"]
    resume += ["--override-opt_param-scheduler"]  # for more iterations
    assert sorted(iterations(train(changed, *arguments(4), *resume, *accept))) == [3, 4]
    # What is saved is of the changed config.
    with pytest.raises(RuntimeError, match=r"rope_theta: 1000\.0 in the checkpoint, 50\.0 in"):
        train(start.config, *arguments(4), *resume)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, train):
    """A config, arguments that load a converted checkpoint, and what one process then logs."""

    def make(folder: Path) -> None:
        config = layout_runs.layout_config()
        write_hf_folder(folder / "hf", config, random_weights(config, 11))
        convert_to_megatron(folder / "hf", folder / "converted")
        output = train(folder / "hf" / "config.json", *arguments(3), *load(folder))
        (folder / "log").write_text(output)

    def load(folder: Path) -> list[str]:
        return ["--load", str(folder / "converted"), "--exit-on-missing-checkpoint"]

    folder = once(tmp_path_factory, "converted", make)
    return folder / "hf" / "config.json", load(folder), iterations((folder / "log").read_text())


@pytest.mark.transformer_engine(only=True)
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("tp2", "", marks=every_version),
        ("cp2", "--cp-comm-type a2a"),
    ],
)
def test_layout_on_transformer_engine(converted, train, name, how):
    """Its Python, with kernels stood in for, trains as Megatron-Core's own layers do."""
    config, load, expected = converted
    processes, layout = LAYOUTS[name]
    words = [*on_engine(arguments(3)), *load, *layout.split(), *how.split()]
    assert_same_training(iterations(train(config, *words, processes=processes)), expected)


def test_ranks_that_build_different_models_are_named(start, tmp_path):
    """Rank 1 gets another window, by a wrapper around the script."""
    script = tmp_path / "different.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.environ['STEP35_WINDOW'] = 'steptron'\n"
        "    os.environ['STEP35_PADDED_LOGITS'] = 'kept'\n"
        f"sys.argv[0] = {str(layout_runs.SCRIPT)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    pp2 = LAYOUTS["pp2"][1].split()
    with pytest.raises(RuntimeError) as error:
        run(start.config, *arguments(2), *pp2, processes=2, script=script)
    for line in (
        "window: hf on rank(s) 0, steptron on rank(s) 1",
        "padded logits: masked on rank(s) 0, kept on rank(s) 1",
    ):
        assert line in str(error.value)
