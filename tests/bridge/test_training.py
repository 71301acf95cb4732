"""Megatron-Bridge's own loop with this package's provider: train, save, go on, export."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from support.bridge_processes import needs_bridge, output_of
from support.converted import assert_same, read
from support.figures import record

from step35_patch import Step35Config
from step35_patch.convert import convert_to_hf

pytestmark = [
    pytest.mark.slow,
    needs_bridge,
]


def train(ranks, published, checkpoint, processes=1, **options):
    code = "from support.bridge_worker import train\ntrain(*arguments)"
    return ranks.run(code, processes, published, checkpoint, json.dumps(options))


def losses(ended) -> dict[int, list[str]]:
    """By iteration: the main loss and the MTP layers', and the gradients' norm, as printed."""
    assert not any(ended.statuses), ended.text[-6000:]
    return {
        int(line[1]): re.findall(r"(?:loss|norm): ([\d.E+-]+)", line[0])
        for line in re.finditer(r"iteration +(\d+)/.*lm loss.*", ended.text)
    }


@pytest.fixture(scope="module")
def trained(bridge_ranks, published, tmp_path_factory):
    """The checkpoints of a run of four iterations, its losses, and the folder it began with."""
    checkpoint = tmp_path_factory.mktemp("trained")
    found = losses(train(bridge_ranks, published, checkpoint))
    assert list(found) == [1, 2, 3, 4] and len(found[1]) >= 4
    assert float(found[4][0]) < float(found[1][0])
    return checkpoint, found, published


def test_layouts_train_alike(bridge_ranks, published, trained, tmp_path):
    fields = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    found = losses(train(bridge_ranks, published, tmp_path, 4, iterations=2, fields=fields))
    assert [*found] == [1, 2]
    for iteration, values in found.items():
        expected = [float(value) for value in trained[1][iteration]]
        off = max(
            abs(float(value) / wanted - 1) for value, wanted in zip(values, expected, strict=True)
        )
        assert record("training losses", off) < 2e-4, (values, expected)


@pytest.fixture(scope="module")
def begun(bridge_ranks, published, tmp_path_factory):
    """By gate layout: the checkpoint of a run's first two iterations, and their losses."""
    found = {}
    for gate_layout in ("headwise", "expanded"):
        folder = tmp_path_factory.mktemp(gate_layout)
        ended = train(bridge_ranks, published, folder, iterations=2, gate_layout=gate_layout)
        found[gate_layout] = folder, losses(ended)
    return found


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
def test_a_run_goes_on_from_its_checkpoint(
    bridge_ranks, published, trained, begun, tmp_path, gate_layout
):
    folder, first = begun[gate_layout]
    checkpoint = shutil.copytree(folder, tmp_path / "checkpoint")
    second = losses(train(bridge_ranks, published, checkpoint, gate_layout=gate_layout))
    assert [*first, *second] == [1, 2, 3, 4]
    if gate_layout == "headwise":
        assert first | second == trained[1]
        record("identical logs of iterations", len(second))


def test_muon_is_an_optimizer_of_it(bridge_ranks, published, trained, tmp_path):
    found = losses(train(bridge_ranks, published, tmp_path, optimizer="muon"))
    assert found[1][0] == trained[1][1][0] and found[3][0] != trained[1][3][0]
    assert float(found[4][0]) < float(found[1][0])


def test_finetuning_begins_with_a_checkpoints_weights(bridge_ranks, published, trained, tmp_path):
    pretrained = str(trained[0])
    found = losses(train(bridge_ranks, published, tmp_path, iterations=2, pretrained=pretrained))
    assert list(found) == [1, 2]
    # The first sequences once more, after four steps.
    assert float(found[1][0]) < float(trained[1][1][0])


ATTENTION = ["linear_qkv", "linear_proj"]
APART = [*(f"linear_{part}" for part in "qgkv"), "linear_fc1_gate", "linear_fc1_up"]


@pytest.mark.parametrize(
    ("gate_layout", "kind", "layers"),
    [
        ("expanded", "LoRA", [*ATTENTION, "linear_fc1", "linear_fc2", "output_layer"]),
        ("headwise", "Step35CanonicalLoRA", APART),
        ("headwise", "DoRA", ATTENTION),
    ],
)
def test_adapters_are_trained_and_resumed(
    bridge_ranks, published, trained, begun, tmp_path, gate_layout, kind, layers
):
    pretrained = {"headwise": trained[0], "expanded": begun["expanded"][0]}[gate_layout]
    options = {
        "pretrained": str(pretrained),
        "adapters": [kind, layers],
        "gate_layout": gate_layout,
    }
    whole = losses(train(bridge_ranks, published, tmp_path, **options))
    # As if it had ended after the second iteration.
    shutil.rmtree(tmp_path / "iter_0000004")
    second = tmp_path / "iter_0000002"
    shutil.copy(second / "train_state.pt", tmp_path / "latest_train_state.pt")
    again = losses(train(bridge_ranks, published, tmp_path, **options))
    assert [*whole] == [1, 2, 3, 4]
    assert again == {iteration: whole[iteration] for iteration in (3, 4)}
    # It begins where the pretrained weights are, and gets on.
    assert float(whole[1][0]) < float(trained[1][1][0])
    assert whole[4] != trained[1][4]


def test_a_checkpoint_of_another_model_is_refused(bridge_ranks, published, trained, tmp_path):
    checkpoint = shutil.copytree(trained[0], tmp_path / "checkpoint")
    ended = train(bridge_ranks, published, checkpoint, fields={"window": "steptron"})
    assert ended.statuses == [1]
    assert "window: hf in the checkpoint, steptron in this run" in ended.text

    document = json.loads((published / "config.json").read_text())
    document["swiglu_limits_shared"][0] = 0.7
    other = shutil.copytree(published, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(document))
    ended = train(bridge_ranks, other, checkpoint)
    assert ended.statuses == [1]
    assert re.search(r"swiglu_limits_shared: .* in the checkpoint, .* in this run", ended.text)

    accepted = {"accept_changed": ["swiglu_limits_shared"]}
    ended = train(bridge_ranks, other, checkpoint, fields=accepted)
    assert ended.statuses == [0], ended.text[-6000:]
    assert re.search(r"another config, as accepted:\n +swiglu_limits_shared: ", ended.text)


def test_ranks_that_disagree_are_refused(bridge_ranks, published, tmp_path):
    two = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    other = {"window": "steptron"}
    ended = train(bridge_ranks, published, tmp_path, 2, fields=two, fields_of_rank_1=other)
    assert any(ended.statuses)
    assert "window: hf on rank(s) 0, steptron on rank(s) 1" in ended.text


def test_what_is_exported_is_what_was_trained(bridge_ranks, published, trained, tmp_path):
    """By Megatron-Bridge, which makes the model of the checkpoint's run_config.yaml alone."""
    code = "from support.bridge_worker import export\nexport(*arguments)"
    ended = bridge_ranks.run(code, 1, published, trained[0], tmp_path / "exported")
    assert ended.statuses == [0], ended.text[-6000:]
    convert_to_hf(trained[0] / "iter_0000004", tmp_path / "converted", hf_dir=published)
    assert_same(read(tmp_path / "exported"), read(tmp_path / "converted"))


def test_a_process_without_a_config_makes_the_model_of_a_checkpoint(trained):
    """Its run_config.yaml names classes of this package, which nothing there has imported."""
    code = """
import sys
from support import bridge_on_cpu
bridge_on_cpu.install()
import megatron.bridge
assert "step35_patch.bridge" not in sys.modules
bridge_on_cpu.install_training()
from megatron.bridge.training.model_load_save import load_model_config
provider, _ = load_model_config(sys.argv[1])
print(type(provider).__name__, provider.step35.config.fingerprint, provider.seq_length)
"""
    found = output_of(code, trained[0] / "iter_0000004").splitlines()[-1]
    config = Step35Config.from_pretrained(trained[2])
    assert found == f"Step35BridgeProvider {config.fingerprint} 24"
