"""What stands in Megatron's data path of packed documents, against definitions by brute force."""

from __future__ import annotations

import inspect
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.packed_runs import CONVERSATIONS, PACK, TOKENIZER, packs
from support.reference import tiny_config

import step35_patch

pytestmark = pytest.mark.megatron

from megatron.core import utils as megatron_utils  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.tokenizers.text.libraries import sft_tokenizer  # noqa: E402
from megatron.training.datasets.sft_dataset import SFTDataset  # noqa: E402

from step35_patch.patch import packed_data  # noqa: E402
from step35_patch.patch.packed_data import in_slots, partitioned_indices  # noqa: E402


@pytest.fixture
def active(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config()))
    step35_patch.activate(path)
    yield path
    step35_patch.activate()  # inert again


def bounds_of(seed: int, multiple: int) -> torch.Tensor:
    """Documents of 0 to 6 times `multiple` tokens, the last one not empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (9,), generator=generator) * multiple
    return torch.cat([torch.zeros(1), lengths.cumsum(0), lengths.sum()[None] + multiple]).int()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_indices_are_two_chunks_of_each_document(ranks, seed):
    bounds = bounds_of(seed, 2 * ranks)
    total = int(bounds[-1])
    assert (bounds.diff() == 0).any() or seed == 0
    seen = []
    for rank in range(ranks):
        wanted = []
        for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
            chunks = np.split(np.arange(start, end), 2 * ranks)
            wanted += [*chunks[rank], *chunks[2 * ranks - 1 - rank]]
        found = partitioned_indices(bounds, total, ranks, rank)
        assert found.dtype == torch.int32
        assert found.tolist() == wanted
        seen += wanted
    assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_indices_are_those_of_transformer_engine(ranks, seed):
    """By the arithmetic of its kernel, which goes by a token's place among the rank's tokens."""
    bounds = bounds_of(seed, 2 * ranks)
    own = bounds // ranks
    for rank in range(ranks):
        wanted = []
        for token in range(int(own[-1])):
            document = int(torch.searchsorted(own, token, right=True)) - 1
            half = int(own[document + 1] - own[document]) // 2
            place = token - int(own[document])
            chunk = rank if place < half else (ranks - 1) * 2 - rank
            wanted.append(place + int(own[document]) * ranks + half * chunk)
        assert partitioned_indices(bounds, int(bounds[-1]), ranks, rank).tolist() == wanted


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 4, 10, 16], r"multiples of 2 x context parallel size = 4, found \[10\]"),
        ([0, 4, 12], "places from 0 to the batch's 16 tokens"),
        ([0, 8, 4, 16], "none before the one to its left"),
    ],
)
def test_documents_that_cannot_be_dealt_out(bounds, message):
    with pytest.raises(ValueError, match=message):
        partitioned_indices(torch.tensor(bounds).int(), 16, 2, 0)


def dealt(batch: dict, bounds: torch.Tensor, rank: int, monkeypatch) -> dict:
    """A rank's part of two, by the functions of this Megatron-Core that its scripts call."""
    batch = dict(batch)
    if hasattr(megatron_utils, "get_thd_batch_on_this_cp_rank"):  # 0.17
        longest = bounds.diff().max()[None]
        part, params = megatron_utils.get_thd_batch_on_this_cp_rank(
            batch, bounds, None, longest, cp_size=2, cp_rank=rank
        )
        assert params.qkv_format == "thd"
        assert params.cu_seqlens_q.tolist() == bounds.tolist()
        return part
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    batch |= {"cu_seqlens": bounds[None], "cu_seqlens_padded": None}
    options = {"is_hybrid_cp": False, "cp_group": None}
    own = inspect.signature(megatron_utils.get_batch_on_this_cp_rank).parameters
    if "use_per_sequence_balancing" in own:  # as of --dataloader-inter-document-masking
        options["use_per_sequence_balancing"] = True
    return megatron_utils.get_batch_on_this_cp_rank(batch, **options)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("without", [(), ("tokens", "position_ids"), ("labels", "loss_mask")])
def test_batch_is_dealt_out_by_document(rank, without, active, monkeypatch):
    """On stages that have all, the labels or the tokens."""
    bounds = bounds_of(2, 4)
    places = torch.arange(int(bounds[-1]))[None]
    batch = {"tokens": places, "labels": 9 + places, "loss_mask": 0.5 * places}
    batch |= {"position_ids": 3 * places} | dict.fromkeys(without)
    part = dealt(batch, bounds, rank, monkeypatch)
    index = partitioned_indices(bounds, int(bounds[-1]), 2, rank).long()
    for name, whole in batch.items():
        if whole is None:
            assert part[name] is None
        else:
            assert torch.equal(part[name], whole[:, index]), name
    assert megatron_utils.tex is None


def test_other_models_fail_as_before(monkeypatch):
    bounds = bounds_of(2, 4)
    batch = {"tokens": torch.arange(int(bounds[-1]))[None]}
    if hasattr(megatron_utils, "get_thd_batch_on_this_cp_rank"):
        with pytest.raises(AssertionError, match="update Transformer Engine"):
            dealt(batch, bounds, 0, monkeypatch)
        return
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    batch |= {"cu_seqlens": bounds[None], "cu_seqlens_padded": None}
    with pytest.raises(AttributeError, match="thd_get_partitioned_indices"):
        megatron_utils.get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=None)


class Conversations:
    """The data set of --sft with the conversations of the tests, without the package `datasets`."""

    def __init__(self, prompt_format: str, ranks: int):
        lines = CONVERSATIONS.read_text().splitlines()
        tokenizer = sft_tokenizer.SFTTokenizer(str(TOKENIZER), prompt_format)
        self.dataset = SFTDataset.__new__(SFTDataset)
        self.dataset.config = SimpleNamespace(
            tokenizer=SimpleNamespace(
                pad=tokenizer.pad_id,
                eod=tokenizer.eod,
                tokenize_conversation=tokenizer.tokenize_conversation,
            ),
            sequence_length=PACK,
            context_parallel_size=ranks,
            reset_position_ids=False,
            reset_attention_mask=False,
            create_attention_mask=False,
        )
        self.dataset.dataset = [json.loads(line)["messages"] for line in lines]
        self.dataset.indices = np.arange(len(lines))
        self.dataset.num_samples = len(lines)

    def __getitem__(self, number: int) -> dict:
        return self.dataset[number]


@pytest.mark.parametrize("prompt_format", ["default", "nemotron-h-aligned"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_predicted_of_conversations(prompt_format, ranks, active):
    """Tokens, labels and the loss's mask of each pack, against the documents of its line."""
    multiple = 2 * ranks if ranks > 1 else 1
    samples = Conversations(prompt_format, ranks)
    for number, documents in enumerate(packs(prompt_format, multiple)):
        sample, start = samples[number], 0
        bounds = sample["cu_seqlens"].unique().tolist()
        assert bounds[-1] == PACK
        counted = torch.zeros(PACK)
        for place, (tokens, targets) in enumerate(documents):
            assert bounds[place] == start
            assert sample["tokens"][start : start + len(tokens)].tolist() == tokens
            for ahead, target in enumerate(targets[1:], start):
                if target != -100:
                    counted[ahead] = 1
                    assert sample["labels"][ahead] == target
            start += -(-len(tokens) // multiple) * multiple
        assert torch.equal(sample["loss_mask"], counted), number


def test_a_worker_that_is_not_activated_goes_by_the_config(active):
    """Spawned, it gets the data set alone; Megatron's builder is where its config passes by."""
    samples = Conversations("default", 1)
    samples.dataset.config.mock = True
    wanted = samples[0]["loss_mask"]
    step35_patch.activate()  # inert, as such a worker is
    assert not torch.equal(samples[0]["loss_mask"], wanted)
    step35_patch.activate(active)
    BlendedMegatronDatasetBuilder(SFTDataset, [1, 1, 1], lambda: True, samples.dataset.config)
    step35_patch.activate()
    sent = pickle.loads(pickle.dumps(vars(samples.dataset.config) | {"tokenizer": None}))
    samples.dataset.config = SimpleNamespace(
        **sent | {"tokenizer": samples.dataset.config.tokenizer}
    )
    assert torch.equal(samples[0]["loss_mask"], wanted)


def test_conversations_of_other_models_are_as_before(monkeypatch):
    if not hasattr(sft_tokenizer.SFTTokenizer, "_extract_token_ids"):
        pytest.skip("0.17's tokenizer is for transformers 4")
    sample = Conversations("default", 1)[0]
    ends = sample["cu_seqlens"].unique()[1:-1].long()
    assert (sample["loss_mask"][ends - 1] == 1).all()


def test_padding_that_is_none_or_the_end():
    packed_data.check_padding.cache_clear()
    with pytest.raises(ValueError, match="--sft-tokenizer-prompt-format: expected"):
        packed_data.check_padding(None, 1)
    with pytest.warns(RuntimeWarning, match=r"--sft: the tokenizer pads with its end .*token 1"):
        packed_data.check_padding(1, 1)


@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_slots_keep_documents_and_count_no_padding(multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    length = 64
    cuts = torch.randperm(length - 1, generator=generator)[:5].sort().values + 1
    bounds = torch.full((length + 1,), length, dtype=torch.int32)
    bounds[: len(cuts) + 1] = torch.cat([torch.zeros(1), cuts]).int()
    mask = (torch.rand(length, generator=generator) < 0.7).float()
    tokens = torch.arange(length)
    sample = {"tokens": tokens, "labels": 100 + tokens, "loss_mask": mask, "dataset_id": 3}
    sample |= {"position_ids": tokens, "cu_seqlens": bounds, "max_seqlen": bounds.diff().max()}
    result = in_slots(sample, multiple)
    slots = result["cu_seqlens"].unique().tolist()
    assert result["dataset_id"] == 3
    assert slots[-1] == length
    assert not any(slot % multiple for slot in slots)
    assert result["max_seqlen"] == max(np.diff(slots))
    documents = bounds.unique().tolist()
    counted = torch.zeros(length)
    for slot, end_of_slot, start, end in zip(
        slots, slots[1:], documents, documents[1:], strict=False
    ):
        kept = min(end - start, end_of_slot - slot)
        inside, whole = slice(slot, slot + kept), slice(start, start + kept)
        for name in ("tokens", "labels"):
            assert torch.equal(result[name][inside], sample[name][whole])
        counted[inside] = mask[whole]
        assert result["position_ids"][inside].tolist() == list(range(kept))
    assert torch.equal(result["loss_mask"], counted)
    assert torch.equal(sample["tokens"], torch.arange(length))  # not changed in place
