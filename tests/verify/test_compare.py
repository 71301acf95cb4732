"""`step35-patch verify`: what it says of models that agree, and where it finds those that don't."""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.parity import FEATURES
from support.reference import (
    PAD_TOKEN,
    SLIDING,
    WINDOW,
    Reference,
    random_weights,
    tiny_config,
    write_hf_folder,
)

from step35_patch import Step35Config
from step35_patch.cli import main
from step35_patch.commands import verify as command
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import INDEX, HfFolder
from step35_patch.tensors.published import layer_tensors, published_tensors
from step35_patch.verify.api import ReferenceMissingError, compare, largest_weights, sequence_length

pytestmark = pytest.mark.megatron

LENGTH = 3 * WINDOW
HEADS = [
    "lm_head.weight",
    "model.layers.6.transformer.shared_head.output.weight",
    "model.layers.7.transformer.shared_head.output.weight",
]
PARTS = [
    "embedding",
    *(f"layer {index}" for index in range(6)),
    HEADS[0],
    *("layer 6", HEADS[1], "layer 7", HEADS[2]),
]


class Source:
    """A dictionary of published tensors as `compare` takes them."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    def get(self, name, *index):
        return self.weights[name][index].clone()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tiny_config()
    weights = random_weights(config, 51)
    return config, weights, write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights)


def differing(report) -> list[str]:
    return [part.name for part in report.parts if part.differing]


def assert_agrees(report):
    assert report.agrees and report.first_difference is None and not differing(report)
    assert max(part.difference for part in report.parts) < 1e-5
    assert max(part.end_to_end for part in report.parts) < 1e-5
    for logits in report.logits:
        assert 1 - 1e-9 < logits.cosine_min <= logits.cosine_mean < 1 + 1e-9
        assert logits.top1 == 1
        assert 0 < logits.largest and 0 < logits.relative < 1e-5


def test_a_good_folder_agrees(case):
    seen = []
    report = compare(case[2], on_part=seen.append)
    assert_agrees(report)
    assert [part.name for part in report.parts] == PARTS
    assert tuple(seen) == report.parts
    assert {part.positions for part in report.parts} == {WINDOW + 64}
    kinds = [part.kind for part in report.parts if part.name.startswith("layer")]
    assert kinds[:3] == ["full, dense", "sliding, dense", "sliding, MoE"]
    assert kinds[4:7] == ["full, MoE", "sliding, MoE", "sliding, dense, MTP"]
    assert [logits.name for logits in report.logits] == HEADS
    # The hidden states that are carried differ by rounding, so the two sides are not one.
    assert report.parts[-1].end_to_end > 0


def test_a_sharded_folder_agrees(case, tmp_path):
    config, weights, _ = case
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_agrees(compare(tmp_path, length=LENGTH))


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_agrees(tmp_path, name):
    config = tiny_config(**FEATURES[name])
    report = compare(write_hf_folder(tmp_path, config, random_weights(config, 52)), batch=2)
    assert_agrees(report)
    mtp = config.get("num_nextn_predict_layers", 0)
    assert len(report.parts) == 8 + 2 * mtp and len(report.logits) == 1 + mtp


def test_a_config_that_transformers_saved_agrees(case, tmp_path):
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    # On saving, the MTP layers' clamps are lost.
    config = tiny_config(swiglu_limits=None, swiglu_limits_shared=None)
    write_hf_folder(tmp_path, config, case[1])
    Step3p7TextConfig.from_dict(config).save_pretrained(tmp_path)
    assert "per_layer_config" in json.loads((tmp_path / "config.json").read_text())
    assert_agrees(compare(tmp_path, length=LENGTH))


def test_experts_that_are_all_chosen_agree(tmp_path):
    config = tiny_config(moe_top_k=4)
    report = compare(write_hf_folder(tmp_path, config, random_weights(config, 53)), length=LENGTH)
    assert_agrees(report)
    assert not any(part.near_ties for part in report.parts)


def test_the_mtp_layers_can_be_left_out(case):
    report = compare(case[2], length=LENGTH, mtp=False)
    assert_agrees(report)
    assert [part.name for part in report.parts] == PARTS[:8]


def _change(tensor):
    return tensor + 0.3 * tensor.flip(0)


def _change_one_expert(tensor):
    changed = tensor.clone()
    changed[1] = _change(changed[1])
    return changed


# What our side's source has instead: tensor, change, and the only part that differs then.
FAULTS = [
    ("model.embed_tokens.weight", _change, "embedding"),
    ("model.layers.1.self_attn.q_norm.weight", _change, "layer 1"),
    ("model.layers.3.self_attn.g_proj.weight", _change, "layer 3"),
    ("model.layers.3.moe.down_proj.weight", _change_one_expert, "layer 3"),
    ("model.layers.4.moe.router_bias", _change, "layer 4"),
    ("model.layers.5.share_expert.up_proj.weight", _change, "layer 5"),
    ("model.norm.weight", _change, HEADS[0]),
    ("lm_head.weight", _change, HEADS[0]),
    ("model.layers.6.enorm.weight", _change, "layer 6"),
    ("model.layers.7.transformer.shared_head.norm.weight", _change, "layer 7"),
    (HEADS[2], _change, HEADS[2]),
]


@pytest.mark.parametrize("tensor, change, part", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_wrong_tensor_of_ours_is_found(case, tensor, change, part):
    _, weights, folder = case
    source = Source(weights | {tensor: change(weights[tensor])})
    report = compare(folder, source=source, length=LENGTH)
    assert not report.agrees
    assert report.first_difference.name == part
    # Given the reference's input, no other part differs; the embedding is read by MTP layers too.
    assert differing(report) == ([part, "layer 6", "layer 7"] if part == "embedding" else [part])
    assert report.suspects == (tensor,)
    # Carried on, everything behind it does.
    behind = report.parts[PARTS.index(part) :]
    if part not in HEADS:
        assert min(p.end_to_end for p in behind) > 1e-4
    assert any(logits.relative > 1e-4 for logits in report.logits)


def test_an_mtp_layer_is_told_from_its_output_matrix(case):
    _, weights, folder = case
    names = ["model.layers.6.eh_proj.weight", HEADS[1]]
    source = Source(weights | {name: _change(weights[name]) for name in names})
    report = compare(folder, source=source, length=LENGTH)
    assert differing(report) == ["layer 6", HEADS[1]]
    assert report.suspects == (names[0],)


def test_a_tensor_of_one_wrong_number_is_found(case):
    _, weights, folder = case
    name = "model.layers.2.self_attn.v_proj.weight"
    wrong = weights[name].clone()
    wrong[3, 4] = math.nan
    report = compare(folder, source=Source(weights | {name: wrong}), length=LENGTH)
    assert report.first_difference.name == "layer 2"
    assert report.suspects == (name,)


def test_wrong_code_of_ours_is_found(case, monkeypatch):
    from step35_patch import Step35ModelProvider

    from_hf = Step35ModelProvider.from_hf
    wider = lambda path, **options: from_hf(path, window="steptron", **options)  # noqa: E731
    monkeypatch.setattr(Step35ModelProvider, "from_hf", wider)
    report = compare(case[2], length=LENGTH, batch=2)
    sliding = [i for i, kind in enumerate(tiny_config()["layer_types"]) if kind == SLIDING]
    assert differing(report) == [f"layer {index}" for index in sliding]
    # One key more is to be seen where there is one.
    assert {p.differing for p in report.parts if p.differing} == {2 * (LENGTH - WINDOW)}
    assert report.suspects == ()


def test_what_a_layer_adds_to_is_not_what_its_difference_is_measured_by(case, tmp_path):
    """A feature as large as trained models have some hides no difference, and is none."""
    config, weights, _ = case
    weights = dict(weights)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][:, 5] = 3e4
    folder = write_hf_folder(tmp_path, config, weights)
    report = compare(folder, length=LENGTH)
    assert report.agrees
    name = "model.layers.1.self_attn.g_proj.weight"
    source = Source(weights | {name: 1.01 * weights[name]})
    report = compare(folder, source=source, length=LENGTH)
    assert report.first_difference.name == "layer 1"
    assert report.parts[2].end_to_end < 1e-4


def test_near_ties_of_experts_are_told_from_differences(case, tmp_path):
    """Two experts that score alike: which one is chosen is rounding's choice, and counted."""
    config, weights, _ = case
    router, bias = "model.layers.2.moe.gate.weight", "model.layers.2.moe.router_bias"
    weights = weights | {router: weights[router].clone()}
    weights[router][1] = weights[router][0]
    weights[bias] = torch.tensor([0.0, 1e-7, 0.0, 0.0])
    folder = write_hf_folder(tmp_path, config, weights)
    source = Source(weights | {bias: torch.tensor([1e-7, 0.0, 0.0, 0.0])})
    report = compare(folder, source=source, length=LENGTH)
    part = report.parts[PARTS.index("layer 2")]
    assert 0 < part.near_ties < part.positions
    assert part.difference > 1e-2 and part.differing == 0
    assert report.agrees
    # One expert of the two preferred by far is no tie any more.
    source = Source(weights | {bias: torch.tensor([0.2, 0.0, 0.0, 0.0])})
    assert compare(folder, source=source, length=LENGTH).first_difference.name == "layer 2"


def test_the_command_says_how_many_near_ties_there_were(case, tmp_path, monkeypatch, capsys):
    config, weights, _ = case
    router, bias = "model.layers.2.moe.gate.weight", "model.layers.2.moe.router_bias"
    changed = weights[router].clone()
    changed[1] = changed[0]
    weights = weights | {router: changed, bias: torch.zeros(4)}
    folder = write_hf_folder(tmp_path, config, weights)
    ties = sum(part.near_ties for part in compare(folder, length=LENGTH).parts)
    assert ties and run(monkeypatch, folder, "--length", LENGTH) == 0
    assert f"of what it does, {ties} near ties of experts left out\n" in capsys.readouterr().out


def test_the_logits_are_those_of_the_whole_models(case, monkeypatch):
    """All numbers of the logits, from transformers' whole model with the weights of either side."""
    from step35_patch.verify import pieces
    from step35_patch.verify.by_layer import _random_tokens

    # Several blocks of the vocabulary, the last one shorter.
    monkeypatch.setattr(pieces, "VOCABULARY_ROWS", 36)
    config, weights, folder = case
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = weights | {name: _change(weights[name])}
    report = compare(folder, source=Source(changed), length=LENGTH, batch=2, seed=7)
    tokens = _random_tokens(Step35Config.from_dict(config), (2, LENGTH), 7)
    both = []
    for side in (weights, changed):
        reference = Reference(config, side)
        with torch.no_grad():
            hidden = reference.hidden_states(tokens)
            both.append([reference.logits(hidden), *reference.mtp_logits(tokens, hidden)])
    for found, wanted, ours in zip(report.logits, *both, strict=True):
        cosine = torch.nn.functional.cosine_similarity(wanted.double(), ours.double(), dim=-1)
        assert found.cosine_min == pytest.approx(cosine.min().item(), abs=1e-6)
        assert found.cosine_mean == pytest.approx(cosine.mean().item(), abs=1e-6)
        largest = (wanted - ours).abs().max().item()
        assert found.largest == pytest.approx(largest, rel=1e-4)
        assert found.relative == pytest.approx(largest / wanted.abs().max().item(), rel=1e-4)
        top1 = (wanted.argmax(-1) == ours.argmax(-1)).double().mean().item()
        assert found.top1 == pytest.approx(top1) and 0.2 < top1 < 1


def test_bfloat16_agrees_coarsely(tmp_path):
    config = tiny_config(torch_dtype="bfloat16")
    weights = {
        name: tensor if name.endswith("router_bias") else tensor.bfloat16()
        for name, tensor in random_weights(config, 54).items()
    }
    folder = write_hf_folder(tmp_path, config, weights)
    assert_agrees(compare(folder, length=LENGTH))  # in float32
    report = compare(folder, length=LENGTH, dtype=torch.bfloat16)
    assert report.agrees and report.tolerance == 5e-2
    assert max(part.difference for part in report.parts) > 1e-3
    name = "model.layers.3.self_attn.g_proj.weight"
    source = Source(weights | {name: _change(weights[name])})
    report = compare(folder, source=source, length=LENGTH, dtype=torch.bfloat16)
    assert differing(report) == ["layer 3"]


# --- What it takes ------------------------------------------------------------------------------


def _anonymous_bytes() -> int:
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return 4096 * (int(resident) - int(shared))


def test_no_layer_is_in_memory_as_a_whole(tmp_path, monkeypatch):
    config = tiny_config(hidden_size=128, moe_num_experts=64, moe_intermediate_size=256)
    folder = write_hf_folder(tmp_path, config, random_weights(config, 55))
    parsed = Step35Config.from_dict(config)
    layer = sum(info.num_bytes for info in layer_tensors(parsed, parsed.layers[2]))
    assert layer > 25e6
    seen, get = [], HfFolder.get

    def probed(self, name, *index):
        tensor = get(self, name, *index)
        seen.append(_anonymous_bytes())
        return tensor

    monkeypatch.setattr(HfFolder, "get", probed)
    report = compare(folder, length=LENGTH)
    assert report.agrees and len(seen) > 2 * 3 * 64
    # 64 tokens of activations and the allocator's own are in it too.
    assert max(seen) - seen[0] < layer / 3
    assert 4 * largest_weights(parsed, "float32") < layer / 3


def test_the_most_weights_at_a_time_are_those_of_one_module():
    from step35_patch.config import packaged_config_path

    published = Step35Config.from_pretrained(packaged_config_path())
    assert largest_weights(published, "float32") == 2 * 11264 * 4096 * 4
    assert largest_weights(published, "bfloat16") == 2 * 11264 * 4096 * 2
    # 6 heads with a gate and 2 groups' keys and values; 500 rows of the vocabulary; as many as are
    # read at a time
    for changes, elements in [
        ({}, (6 * 17 + 4 * 16) * 32),
        ({"vocab_size": 500}, 500 * 32),
        ({"vocab_size": 5000}, 4096 * 32),
        ({"moe_intermediate_size": 90}, 2 * 90 * 32),
    ]:
        config = Step35Config.from_dict(tiny_config(**changes))
        assert largest_weights(config, "float32") == elements * 4


def test_weights_are_read_once_on_each_side(case, monkeypatch):
    _, weights, folder = case
    counts: dict[str, dict] = {"ours": {}, "reference": {}}

    def count(side, name, index):
        key = name, str(index)
        counts[side][key] = counts[side].get(key, 0) + 1

    get = HfFolder.get

    def counted(self, name, *index):
        count("reference", name, index)
        return get(self, name, *index)

    class Counted(Source):
        def get(self, name, *index):
            count("ours", name, index)
            return super().get(name, *index)

    monkeypatch.setattr(HfFolder, "get", counted)
    assert compare(folder, source=Counted(weights), length=LENGTH).agrees
    for side in counts.values():
        assert {name for name, _ in side} == set(weights)
        twice = {name for (name, _), times in side.items() if times > 1}
        # The reference's experts of one number are asked for once more to see near ties.
        assert all(name.endswith("router_bias") for name in twice)


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [WINDOW, WINDOW - 1, 0, -3])
def test_a_length_that_cannot_show_the_window_is_refused(case, length):
    with pytest.raises(ValueError, match=f"length: expected more than .* {WINDOW} .* {length}"):
        compare(case[2], length=length)


def test_the_length_is_beyond_the_window():
    def length(given=None, **changes):
        return sequence_length(Step35Config.from_dict(tiny_config(**changes)), given)

    assert length() == WINDOW + 64
    assert length(sliding_window=100) == 200
    assert length(sliding_window=200) == 256  # max_position_embeddings
    assert length(WINDOW + 1) == WINDOW + 1
    assert length(2, **FEATURES["no window"]) == 2
    with pytest.raises(ValueError, match="more than the sliding window's 256 tokens, found 256"):
        length(sliding_window=256)


def test_other_arguments_are_refused(case, tmp_path, monkeypatch):
    config, weights, folder = case
    with pytest.raises(ValueError, match="dtype: expected one of .* found torch.float16"):
        compare(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="batch: expected at least 1, found 0"):
        compare(folder, batch=0)
    few = {name: tensor for name, tensor in weights.items() if "layers.3" not in name}
    with pytest.raises(CheckpointError, match="model.layers.3.moe.gate.weight: missing"):
        compare(write_hf_folder(tmp_path, config, few))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="world size: expected 1, found 2"):
        compare(folder)


def test_transformers_that_is_missing_is_asked_for(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.step3p7", None)
    with pytest.raises(ReferenceMissingError, match=r'pip install "transformers>=5.23"'):
        compare(case[2])


@pytest.mark.parametrize("pad", [0, 3, PAD_TOKEN, None, -1])
def test_the_padding_is_not_among_the_tokens(pad):
    from step35_patch.verify.by_layer import _random_tokens

    config = Step35Config.from_dict(tiny_config(pad_token_id=pad))
    tokens = _random_tokens(config, (4, 2000), 0)
    assert set(tokens.unique().tolist()) == set(range(96)) - {pad}
    assert torch.equal(tokens, _random_tokens(config, (4, 2000), 0))
    assert not torch.equal(tokens, _random_tokens(config, (4, 2000), 1))


# --- The command --------------------------------------------------------------------------------


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_what_agrees(case, monkeypatch, capsys):
    assert run(monkeypatch, case[2], "--against", "transformers", "--seed", 3) == 0
    out = capsys.readouterr().out
    assert f"6 decoder layers and 2 MTP layers on {WINDOW + 64} random tokens (seed 3)" in out
    assert "weights in memory: at most 0.0212 MB at a time" in out
    rows = [line for line in out.splitlines() if line.split("  ")[0] in PARTS]
    assert len(rows) == len(PARTS) - 1  # lm_head's has the norm's name behind it
    assert all(row.split()[-2:] == ["0", "0"] for row in rows)
    assert "layer 2    sliding, MoE" in out and "layer 7    sliding, dense, MTP" in out
    for head in HEADS:
        assert f"logits of {head}\n  cosine              1.000000000 at least" in out
    assert out.count("top-1 agreement     100.00%") == 3
    assert out.endswith(
        "first layer that differs: none\nAGREE: no part differs by more than 0.0001 of what it does\n"
    )


def test_the_command_names_what_differs(case, monkeypatch, capsys):
    _, weights, folder = case
    name = "model.layers.3.self_attn.g_proj.weight"
    given = []

    def source(path, config, mtp):
        given.append((path, config.num_hidden_layers, mtp))
        return Source(weights | {name: _change(weights[name])})

    monkeypatch.setattr(command, "_checkpoint_source", source)
    assert run(monkeypatch, folder, "--checkpoint", "trained", "--length", LENGTH) == 1
    out = capsys.readouterr().out
    assert given == [("trained", 6, True)]
    assert "ours:                trained" in out
    assert "first layer that differs: layer 3\nDIFFER: layer 3 does, by" in out
    assert f"of {LENGTH} positions\n" in out
    assert out.endswith(f"with other values than HF_DIR's:\n  {name}\n")


def test_the_command_reads_a_megatron_checkpoint(case, tmp_path, monkeypatch, capsys):
    _, weights, folder = case
    checkpoint, changed = tmp_path / "megatron", tmp_path / "changed"
    assert main(["convert", "to-megatron", str(folder), str(checkpoint)]) == 0
    assert run(monkeypatch, folder, "--checkpoint", checkpoint, "--length", LENGTH) == 0
    name = "model.layers.5.moe.up_proj.weight"
    weights = weights | {name: _change_one_expert(weights[name])}
    write_hf_folder(changed, case[0], weights)
    capsys.readouterr()
    assert run(monkeypatch, changed, "--checkpoint", checkpoint, "--length", LENGTH) == 1
    out = capsys.readouterr().out
    assert "first layer that differs: layer 5" in out and out.endswith(f":\n  {name}\n")


@pytest.mark.parametrize("lacks", ["MTP layers", "equal gate rows"])
def test_the_command_refuses_a_checkpoint_that_lacks(case, monkeypatch, capsys, lacks):
    from step35_patch.storage import megatron_checkpoint as megatron_source
    from step35_patch.tensors.qkv import DriftedGateError

    class Lacking(Source):
        absent = (HEADS[2],) if lacks == "MTP layers" else ()

        def __init__(self, path, config):
            super().__init__(case[1])

        def refuse_drifted_gates(self):
            if lacks == "equal gate rows":
                raise DriftedGateError("drifted")

    monkeypatch.setattr(megatron_source, "MegatronCheckpoint", Lacking)
    arguments = (case[2], "--checkpoint", "trained", "--length", LENGTH)
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    if lacks == "MTP layers":
        assert f"expected 2 MTP layers as in config.json, found no {HEADS[2]}" in error
        assert run(monkeypatch, *arguments, "--no-mtp") == 0
    else:
        assert "drifted" in error


def test_the_command_leaves_the_mtp_layers_out(case, monkeypatch, capsys):
    assert run(monkeypatch, case[2], "--no-mtp", "--length", LENGTH, "--seed", 1) == 0
    out = capsys.readouterr().out
    assert run(monkeypatch, case[2], "--no-mtp", "--length", LENGTH, "--seed", 2) == 0
    assert capsys.readouterr().out.replace("seed 2", "seed 1") != out
    assert "0 MTP layers" in out and "layer 6" not in out and out.count("logits of") == 1


def test_the_command_says_why_nothing_was_compared(case, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, tmp_path) == 1
    assert "config.json" in capsys.readouterr().err
    assert run(monkeypatch, case[2], "--length", WINDOW) == 1
    assert "length: expected more than" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers.models.step3p7", None)
    assert run(monkeypatch, case[2]) == 1
    printed = capsys.readouterr()
    assert 'pip install "transformers>=5.23"' in printed.err and not printed.out
    with pytest.raises(SystemExit):
        run(monkeypatch, case[2], "--against", "vllm")


def test_a_process_is_left_as_it_was(case):
    """Twice in a process of its own, which has no groups before or after."""
    program = """
import sys
from step35_patch.commands import verify
assert "torch" not in sys.modules  # `step35-patch --help` has to be quick
import argparse
parser = argparse.ArgumentParser()
verify.add_arguments(parser)
for _ in range(2):
    assert verify.run(parser.parse_args(sys.argv[1:])) == 0
    import torch
    from megatron.core import parallel_state
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
"""
    arguments = [str(case[2]), "--length", str(LENGTH)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AGREE") == 2


def test_the_command_prints_no_upstream_warning(case):
    """The real command, as a process: what it imports warns of what a user cannot act upon."""
    arguments = ["verify", str(case[2]), "--length", str(LENGTH)]
    done = subprocess.run(
        [sys.executable, "-m", "step35_patch.cli", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0 and "AGREE" in done.stdout, done.stderr
    assert "Warning" not in done.stderr and "DEPRECATED" not in done.stderr


def test_the_command_leaves_the_warnings_filters_as_they_were(case, monkeypatch):
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    before = list(warnings.filters), list(logger.filters)
    assert run(monkeypatch, case[2], "--length", LENGTH, "--no-mtp") == 0
    assert (list(warnings.filters), list(logger.filters)) == before


def test_the_tensors_of_the_parts_are_all(case):
    """Every published tensor is some part's: a wrong one cannot be missed for being in none."""
    config = Step35Config.from_dict(case[0])
    of_layers = {info.name for plan in config.layers for info in layer_tensors(config, plan)}
    others = {info.name for info in published_tensors(config)} - of_layers
    assert others == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
