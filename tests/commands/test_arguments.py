"""The arguments for a config, held against the parsers of the installed Megatron-Core."""

import json
import shlex
import subprocess
import sys

import pytest

from step35_patch.arguments import CPU_ARGUMENTS, megatron_arguments
from step35_patch.cli import main
from step35_patch.config import Step35Config, packaged_config_path

pytestmark = pytest.mark.megatron

# Goes the way of megatron.training from each command line to the TransformerConfig, and says how
# that contradicts the Step-3.5 config, and what has no place in a TransformerConfig.
SCRIPT = """
import json, sys
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from step35_patch.config import Step35Config
from step35_patch.model.description import conflicts

seen = {}
for name, (document, command_line) in json.loads(sys.argv[1]).items():
    sys.argv[1:] = command_line
    args = parse_args()
    validate_args(args)
    build_tokenizer(args)
    config = core_transformer_config_from_args(args)
    seen[name] = {
        "conflicts": conflicts(config, Step35Config.from_dict(document)),
        "vocabulary": args.padded_vocab_size,
        "untied": args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "dropout": [config.hidden_dropout, config.attention_dropout],
        "experts": config.num_moe_experts,
        "mtp_layers": config.mtp_num_layers,
        "load_balancing": config.moe_router_load_balancing_type,
    }
print("SEEN", json.dumps(seen))
"""
LAUNCH = [
    *CPU_ARGUMENTS,
    *"--tokenizer-type NullTokenizer --seq-length 64 --micro-batch-size 1 --train-iters 1".split(),
]


def published(**changes) -> dict:
    return json.loads(packaged_config_path().read_text()) | changes


def dense_without_mtp() -> dict:
    lists = {k: v[:45] for k, v in published().items() if isinstance(v, list) and len(v) == 48}
    return published(**lists, moe_layers_enum="", num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def seen() -> dict:
    """What Megatron makes of each config's arguments."""
    documents = {
        "published": published(),
        "dense without MTP": dense_without_mtp(),
        "vocabulary that Megatron would round up": published(vocab_size=128815),
    }
    cases = {
        name: [document, megatron_arguments(Step35Config.from_dict(document)) + LAUNCH]
        for name, document in documents.items()
    }
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    lines = [line for line in run.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(lines[0].removeprefix("SEEN "))


def test_published_model(seen):
    assert seen["published"] == {
        "conflicts": [],
        "vocabulary": 128896,
        "untied": True,
        "position_embedding_type": "rope",
        "dropout": [0.0, 0.0],
        "experts": 288,
        "mtp_layers": 3,
        "load_balancing": "none",
    }


def test_without_moe_and_mtp_their_arguments_are_left_out(seen):
    arguments = megatron_arguments(Step35Config.from_dict(dense_without_mtp()))
    assert not [option for option in arguments if "moe" in option or "expert" in option]
    assert "--mtp-num-layers" not in arguments
    found = seen["dense without MTP"]
    assert (found["conflicts"], found["experts"], found["mtp_layers"]) == ([], None, None)


def test_vocabulary_is_not_rounded_up(seen):
    assert seen["vocabulary that Megatron would round up"]["vocabulary"] == 128815


def test_command_prints_them_for_a_shell(capsys):
    assert main(["args", "step-3.5-flash"]) == 0
    printed = capsys.readouterr().out
    config = Step35Config.from_pretrained(packaged_config_path())
    assert shlex.split(printed.replace("\\\n", " ")) == megatron_arguments(config)


def test_command_says_what_is_wrong_with_a_config(capsys, tmp_path):
    assert main(["args", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
