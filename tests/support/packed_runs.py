"""Runs on packed documents by Megatron-LM's own script, and the same documents trained one by one.

The conversations and their tokenizer lie in `tests/support/sft`; `trained_apart` trains
transformers' model on each document alone, with torch's AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from step35_patch.arguments import CPU_ARGUMENTS
from step35_patch.convert import convert_to_megatron
from support import layout_runs
from support.implementation import ON_TRANSFORMER_ENGINE
from support.layout_runs import Iteration, layout_config
from support.reference import Reference, random_weights, write_hf_folder

FOLDER = Path(__file__).with_name("sft")
CONVERSATIONS, TOKENIZER = FOLDER / "conversations.jsonl", FOLDER / "tokenizer"
# A window on which two documents end, a few are shorter than, and most are longer than.
PACK, WINDOW = 160, 32
ITERATIONS, BATCH = 5, 2  # the conversations' ten lines, once
LEARNING_RATE, WEIGHT_DECAY, CLIP, EPS, MTP_SCALE = 1e-3, 0.1, 0.5, 1e-6, 0.1
NOT_COUNTED = -100


def config() -> dict[str, Any]:
    return layout_config() | {"vocab_size": 384, "pad_token_id": 383, "sliding_window": WINDOW}


def weights() -> dict[str, torch.Tensor]:
    # Of the size that training starts from, so that no token is near two experts.
    return {name: 0.25 * weight for name, weight in random_weights(config(), seed=3).items()}


def write_start(folder: Path) -> tuple[Path, list[str]]:
    """The config's path, and the arguments with which a run starts from the weights."""
    published = write_hf_folder(folder / "hf", config(), weights())
    convert_to_megatron(published, folder / "megatron")
    load = ["--load", str(folder / "megatron"), "--exit-on-missing-checkpoint", "--finetune"]
    return published / "config.json", [*load, "--no-load-optim", "--no-load-rng"]


def arguments(iterations: int = ITERATIONS) -> list[str]:
    """Megatron's arguments of every run on packed documents."""
    return [
        *CPU_ARGUMENTS,
        *f"""
        --seq-length {PACK} --num-workers 0 --split 100,0,0 --dataloader-type single
        --micro-batch-size 1 --global-batch-size {BATCH} --train-iters {iterations}
        --lr {LEARNING_RATE} --lr-decay-style constant --weight-decay {WEIGHT_DECAY}
        --adam-beta2 0.999 --adam-eps {EPS} --clip-grad {CLIP} --seed 7
        --moe-router-bias-update-rate 0 --moe-token-dispatcher-type alltoall
        --eval-iters 0 --eval-interval 1000 --log-interval 1 --ckpt-format torch_dist
        """.split(),
    ]


def sft_arguments(prompt_format: str = "default") -> list[str]:
    words = f"--sft --tokenizer-type SFTTokenizer --sft-tokenizer-prompt-format {prompt_format}"
    return [*words.split(), "--tokenizer-model", str(TOKENIZER), "--data-path", str(CONVERSATIONS)]


def plain_documents() -> list[list[int]]:
    """The conversations' texts alone, each ended by the tokenizer's end of document."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    texts = [
        " ".join(message["content"] for message in conversation)
        for line in CONVERSATIONS.read_text().splitlines()
        for conversation in _conversations(line)
    ]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*document, tokenizer.eos_token_id] for document in encoded]


def write_indexed(folder: Path) -> Path:
    """The prefix of Megatron's own files of them, as its tools/preprocess_data.py writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / "text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in plain_documents():
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def document_arguments(prefix: Path, cache: Path) -> list[str]:
    """Of --dataloader-inter-document-masking, ends of documents not predicting the next start."""
    return [
        *("--dataloader-inter-document-masking", "--eod-mask-loss", "--data-path", str(prefix)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(TOKENIZER)),
        *("--data-cache-path", str(cache)),
    ]


def sampled_packs(prefix: Path, cache: Path, granularity: int = 1) -> list[list[Document]]:
    """The documents of each sample of Megatron's stock GPTDataset, which knows nothing of them.

    Args:
        prefix: of `write_indexed`.
        cache: where the data set keeps its indices.
        granularity: as of `packs`.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    end = AutoTokenizer.from_pretrained(TOKENIZER).eos_token_id
    dataset_config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=PACK,
        blend=([str(prefix)], None),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=end, pad=-1, vocab_size=384, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [ITERATIONS * BATCH, 0, 0]
    samples, *_ = BlendedMegatronDatasetBuilder(
        GPTDataset, sizes, lambda: True, dataset_config
    ).build()
    result = []
    for number in range(sizes[0]):
        sample = samples[number]
        tokens = [*sample["tokens"].tolist(), sample["labels"][-1].item()]
        pack, start, place = [], 0, 0
        while start < PACK and place < PACK:
            ends = tokens.index(end, start) if end in tokens[start:PACK] else PACK
            # The last token of one that goes on in the next sample is predicted, too.
            document = tokens[start : ends + 1][: PACK - place + 1]
            pack.append((document, document))
            size = min(ends + 1, PACK) - start
            place += -(-size // granularity) * granularity
            start += size
        result.append(pack)
    return result


def run_script(checkout: Path, config: Path, *more: str, processes: int = 1) -> str:
    """The output of the checkout's pretrain_gpt.py, as it is, on the CPU."""
    words = [*arguments(), *more]
    return layout_runs.run(
        config,
        str(checkout / "pretrain_gpt.py"),
        *(layout_runs.on_engine(words) if ON_TRANSFORMER_ENGINE else words),
        processes=processes,
        script=layout_runs.REAL_SCRIPT,
        python_path=(checkout,),
    )


Document = tuple[list[int], list[int]]  # tokens, and what is predicted of them or NOT_COUNTED


def _conversations(line: str) -> list[list[dict[str, str]]]:
    """Each begins with a message of the system's."""
    found: list[list[dict[str, str]]] = [[]]
    for message in json.loads(line)["messages"]:
        if message["role"] == "system" and found[-1]:
            found.append([])
        found[-1].append(message)
    return found


def packs(prompt_format: str = "default", granularity: int = 1) -> list[list[Document]]:
    """The documents of each line of the conversations, cut where the pack is full.

    Args:
        prompt_format: default, in which all tokens are predicted, or nemotron-h-aligned, in which
            those of the assistant's turns are.
        granularity: a document's place in the pack is a multiple of it.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def default(message: dict[str, str]) -> str:
        return f"<|begin|>{message['role']}\n{message['content']}<|end|>"

    def aligned(message: dict[str, str]) -> str:
        before = {
            "system": "<SPECIAL_10>System\n",
            "user": "<SPECIAL_11>User\n",
            "assistant": "",
        }
        after = "<SPECIAL_11>Assistant\n" if message["role"] == "user" else ""
        return before[message["role"]] + message["content"] + "\n" + after

    text = {"default": default, "nemotron-h-aligned": aligned}[prompt_format]
    result = []
    for line in CONVERSATIONS.read_text().splitlines():
        pack: list[Document] = []
        start = 0
        for conversation in _conversations(line):
            tokens: list[int] = []
            targets: list[int] = []
            for message in conversation:
                ids = tokenizer.encode(text(message), add_special_tokens=False)
                tokens += ids
                counted = prompt_format == "default" or message["role"] == "assistant"
                targets += ids if counted else [NOT_COUNTED] * len(ids)
            room = PACK - start
            if room > 0:
                pack.append((tokens[:room], targets[:room]))
            start += -(-len(tokens) // granularity) * granularity
        result.append(pack)
    return result


def _sums(model: Reference, document: Document) -> list[tuple[torch.Tensor, int]]:
    """Sum and number of the counted tokens' losses: the main one's, then each MTP layer's."""
    tokens, targets = (torch.tensor([values]) for values in document)
    hidden = model.hidden_states(tokens)
    sums = []
    for ahead, logits in enumerate([model.logits(hidden), *model.mtp_logits(tokens, hidden)], 1):
        wanted = targets[0, ahead:]
        loss = F.cross_entropy(
            logits[0, : len(wanted)], wanted, ignore_index=NOT_COUNTED, reduction="sum"
        )
        sums.append((loss, int((wanted != NOT_COUNTED).sum())))
    return sums


def _is_mtp(name: str) -> bool:
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return layer.isdigit() and int(layer) >= config()["num_hidden_layers"]


def trained_apart(
    batches: Iterable[list[list[Document]]], *, mtp: bool = True, per_token: bool = False
) -> dict[int, Iteration]:
    """What Megatron-Core should log: transformers' model trained on each document by itself.

    Losses are means over the counted tokens of a pack, in the objective over its packs; Megatron
    logs the main one as the mean over all tokens of a batch, the MTP layers' as means of means.

    Args:
        batches: an iteration's packs each.
        mtp: whether the MTP layers are trained.
        per_token: whether each counted token of a batch weighs the same
            (--calculate-per-token-loss), in which a pack's MTP losses weigh as its main loss does.
    """
    model = Reference(config(), weights())
    if not mtp:
        model.mtp_layers = []
    trained = [
        parameter
        for name, parameter in model.parameters.items()
        if parameter.requires_grad and (mtp or not _is_mtp(name))
    ]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=EPS)
    logged = {}
    for number, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        main_sum, main_count, mtp_losses = 0.0, 0, torch.zeros(len(model.mtp_layers))
        objectives, pack_counts = [], []
        for pack in batch:
            by_document = [_sums(model, document) for document in pack]
            sums = [sum(loss for loss, _ in of_one) for of_one in zip(*by_document, strict=True)]
            counts = [
                sum(count for _, count in of_one) for of_one in zip(*by_document, strict=True)
            ]
            means = [loss / max(count, 1) for loss, count in zip(sums, counts, strict=True)]
            objective = means[0] + MTP_SCALE * sum(means[1:]) / max(len(means[1:]), 1)
            objectives.append(objective)
            pack_counts.append(counts[0] if per_token else 1)
            main_sum, main_count = main_sum + sums[0].item(), main_count + counts[0]
            mtp_losses += torch.tensor([mean.item() for mean in means[1:]]) / len(batch)
        weighted = zip(objectives, pack_counts, strict=True)
        (sum(loss * weight for loss, weight in weighted) / sum(pack_counts)).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        logged[number] = Iteration(main_sum / main_count, tuple(mtp_losses.tolist()), norm.item())
    # Megatron logs the first iteration once more, in the mean of the second line.
    first, second = logged[1], logged[2]
    mtp = zip(first.mtp_losses, second.mtp_losses, strict=True)
    logged[2] = Iteration(
        (first.loss + second.loss) / 2, tuple((a + b) / 2 for a, b in mtp), second.grad_norm
    )
    return logged


def batches(found: list[list[Document]]) -> list[list[list[Document]]]:
    """Packs by iteration, in the data loader's order."""
    return [found[at : at + BATCH] for at in range(0, len(found), BATCH)]
