"""What a comparison takes in memory and reads, and what it refuses."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from support.comparison import LENGTH, Source
from support.parity import FEATURES
from support.reference import PAD_TOKEN, WINDOW, random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import HfFolder
from step35_patch.tensors.published import layer_tensors
from step35_patch.verify.api import ReferenceMissingError, compare, largest_weights, sequence_length

# --- What it takes ------------------------------------------------------------------------------


def _anonymous_bytes() -> int:
    # What was freed counts for nothing, or the figure would depend on the tests that ran before.
    ctypes.CDLL(None).malloc_trim(0)
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
    with pytest.raises(ValueError, match=r"dtype: expected one of .* found torch.float16"):
        compare(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="batch: expected at least 1, found 0"):
        compare(folder, batch=0)
    few = {name: tensor for name, tensor in weights.items() if "layers.3" not in name}
    with pytest.raises(CheckpointError, match=r"model.layers.3.moe.gate.weight: missing"):
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
