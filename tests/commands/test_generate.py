"""`step35-patch generate`: prints what transformers would choose, and says what it can't read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.installed import environment
from support.reference import WINDOW, Reference, random_weights, tiny_config, write_hf_folder
from transformers import AutoTokenizer

from step35_patch.cli import main

# With each Megatron-Core; the others run with the newest only.
every_version = pytest.mark.megatron

TOKENIZER = Path(__file__).parents[1] / "support" / "sft" / "tokenizer"
NEW = 2 * WINDOW
PROMPTS = ("What is the window of a sliding layer?", "Hello")
END = "4"  # a token of the first one's continuation, and not of the other's
CONFIG = tiny_config(vocab_size=368, pad_token_id=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """In the published layout, with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    write_hf_folder(folder, CONFIG, random_weights(CONFIG, 0))
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory) -> Path:
    """A release of Megatron's, of the same weights."""
    out = tmp_path_factory.mktemp("megatron") / "checkpoint"
    assert main(["convert", "to-megatron", str(folder), str(out)]) == 0
    return out


def generate(*arguments: object) -> int:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return main(["generate", *map(str, arguments), *prompts, "--max-new-tokens", str(NEW)])


def expected(end: int = -1, **changes: object) -> str:
    """What is printed, by transformers without a cache; a text ends before the token `end`."""
    tokenizer, lines = AutoTokenizer.from_pretrained(TOKENIZER), []
    reference = Reference(CONFIG | changes, random_weights(CONFIG, 0))
    for prompt in PROMPTS:
        tokens, new = torch.tensor([tokenizer(prompt)["input_ids"]]), []
        while len(new) < NEW and end not in new:
            with torch.no_grad():
                logits = reference.logits(reference.hidden_states(tokens)[:, -1])
            new.append(logits.argmax().item())
            tokens = torch.cat([tokens, torch.tensor([new[-1:]])], 1)
        cut = "the end of the text" if end in new else "cut off"
        new = [token for token in new if token != end]
        lines.append(f"{prompt}{tokenizer.decode(new)}\n[{len(new)} tokens, {cut}]\n")
    return "\n".join([*lines, ""])


@every_version
def test_a_published_folder(folder):
    """In a process of its own; what Megatron-Core says goes to standard error."""
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    command = [sys.executable, "-m", "step35_patch.cli", "generate", folder, *prompts]
    ended = subprocess.run(
        [*command, "--max-new-tokens", str(NEW)],
        capture_output=True,
        encoding="utf-8",
        env=environment(PYTHONPATH=":".join(sys.path)),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == expected()


@every_version
def test_a_megatron_checkpoint(checkpoint, folder, capfd):
    assert generate(checkpoint, "--hf-dir", folder) == 0
    assert capfd.readouterr().out == expected()


def test_the_window_that_a_checkpoint_was_trained_with(checkpoint, folder, tmp_path, capfd):
    """A run's arguments say so; a converted folder has none, and --window wins."""
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    common = trained / "release" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["args"].step35_window = "steptron"
    torch.save(state, common)
    wider = expected(sliding_window=WINDOW + 1)
    assert wider != expected()
    for arguments in [(trained,), (checkpoint, "--window", "steptron")]:
        assert generate(*arguments, "--hf-dir", folder) == 0
        assert capfd.readouterr().out == wider
    assert generate(trained, "--hf-dir", folder, "--window", "hf") == 0
    assert capfd.readouterr().out == expected()


def test_a_text_ends_where_the_tokenizer_says(folder, tmp_path, capfd):
    ending = tmp_path / "ending"
    shutil.copytree(TOKENIZER, ending)
    file = ending / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": END}))
    assert generate(folder, "--hf-dir", ending) == 0
    out = capfd.readouterr().out
    assert re.findall(r"\[(\d+) tokens, (.*)\]", out) == [
        ("3", "the end of the text"),
        (str(NEW), "cut off"),
    ]
    assert out == expected(AutoTokenizer.from_pretrained(ending).eos_token_id)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_processes_of_torchrun(ranks, folder, stages):
    """Tensor-parallel ones, or two stages."""
    arguments = [folder, "--prompt", PROMPTS[1], "--max-new-tokens", NEW]
    arguments += ["--pipeline-model-parallel-size", stages]
    code = "from step35_patch.cli import main; raise SystemExit(main(['generate', *arguments]))"
    ended = ranks.run(code, 2, *arguments)
    assert ended.statuses == [0, 0], ended.text[-6000:]
    assert ended.text.count(PROMPTS[1]) == 1  # one rank prints
    assert expected().split("\n\n")[1] in ended.text


def refused(capfd, *arguments: object) -> str:
    assert generate(*arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    return captured.err


def test_what_cannot_be_read(folder, checkpoint, tmp_path, capfd):
    assert "nowhere: expected a folder of weights" in refused(capfd, tmp_path / "nowhere")
    assert "--hf-dir: expected the folder" in refused(capfd, checkpoint)
    bare = write_hf_folder(tmp_path / "bare", CONFIG, {})
    assert "expected a tokenizer (tokenizer.json, " in refused(capfd, bare)
    shutil.copytree(TOKENIZER, bare, dirs_exist_ok=True)
    assert "model.norm.weight: missing" in refused(capfd, bare)
    (bare / "tokenizer.json").write_text("{")
    assert "expected a tokenizer that transformers can load" in refused(capfd, bare)
    stages = "--pipeline-model-parallel-size", 2
    assert "expected a divisor of the 1 processes, found 2" in refused(capfd, folder, *stages)


def test_a_tokenizer_or_length_that_does_not_fit(tmp_path, capfd):
    few = write_hf_folder(tmp_path / "few", CONFIG | {"vocab_size": 96}, {})
    shutil.copytree(TOKENIZER, few, dirs_exist_ok=True)
    assert "the tokenizer is another model's" in refused(capfd, few)
    short = write_hf_folder(tmp_path / "short", CONFIG | {"max_position_embeddings": 20}, {})
    shutil.copytree(TOKENIZER, short, dirs_exist_ok=True)
    assert "expected at most max_position_embeddings 20 tokens" in refused(capfd, short)
    options = "--prompt", "x", "--max-new-tokens", "0"
    assert main(["generate", str(short), *options]) == 1
    assert "--max-new-tokens: expected at least 1, found 0" in capfd.readouterr().err


def test_without_transformers(folder, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'step35-patch[reference]'" in refused(capfd, folder)
