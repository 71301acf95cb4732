"""Launch scripts as people have them: accepted as they are, and each of these mistakes is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.installed import PUBLISHED

import step35_patch
from step35_patch import Step35Config
from step35_patch.commands.check_text import print_report
from step35_patch.launch.check import Report, check
from step35_patch.launch.command import chosen, from_words, loose_words
from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.shell import read_script

SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = Path(__file__).parents[2] / "examples"
# What a script takes from the machine that it runs on, and it cannot be checked without.
GIVEN = {"MEGATRON_LM": "/src/Megatron-LM", "MODEL": "/models/Step-3.5-Flash"}


@pytest.fixture(scope="module")
def config():
    yield Step35Config.from_pretrained(PUBLISHED)
    step35_patch.activate()


def checked(config, path: Path, *arguments: str, gpus: int | None = None, **given: str) -> Report:
    calls, notes = read_script(path, arguments, GIVEN | given)
    report = check(config, chosen(calls, path.name, None), gpus=gpus, loose=loose_words(calls))
    report.notes[:0] = notes
    return report


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        (SCRIPTS / "arrays.sh", ()),
        (SCRIPTS / "slurm_container.sh", ()),
        (SCRIPTS / "strings.sh", ("/out", "/data")),
        (SCRIPTS / "entrypoint.sh", ("--nodes", "5", "--debug", "--", "--adam-beta2", "0.95")),
        (EXAMPLES / "sft_torchrun.sh", ()),
        (EXAMPLES / "sft_slurm.sh", ()),
        (EXAMPLES / "pretrain_64_gpus.sh", ()),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_scripts_without_a_mistake_are_accepted(config, path, arguments):
    given = {"EXAMPLES": str(EXAMPLES)} if path.name == "sft_slurm.sh" else {}
    report = checked(config, path, *arguments, **given)
    assert report.problems == []
    layers = sorted(index for stage in report.stages for index in stage.layers)
    assert layers == list(range(len(config.layers)))


# What is exchanged in arrays.sh, the argument that is named, and a part of the line.
MISTAKES = {
    "misspelt": (
        "--global-batch-size 32",
        "--globl-batch-size 32",
        "--globl-batch-size",
        "did you mean --global-batch-size?",
    ),
    "underscores": (
        "--seq-length 131072",
        "--seq_length 131072",
        "--seq_length",
        "did you mean --seq-length?",
    ),
    "abbreviated": (
        "--micro-batch-size 1",
        "--micro-batch 1",
        "--micro-batch",
        "did you mean --micro-batch-size?",
    ),
    "no number": ("--lr 1e-5", "--lr 1e-5x", "--lr", "expected a number, found 1e-5x"),
    "no choice": (
        "--transformer-impl transformer_engine",
        "--transformer-impl te",
        "--transformer-impl",
        "expected one of local, transformer_engine",
    ),
    "no value": ("--min-lr 5e-6", "--min-lr", "--min-lr", "expected a number, found no value"),
    "two values": ("--clip-grad 1.0", "--clip-grad 1.0 2.0", "--clip-grad", "'2.0'"),
    "value of a flag": ("--bf16", "--bf16 true", "--bf16", "expected no value, it is a flag"),
    "shape": (
        "--moe-grouped-gemm",
        "--moe-grouped-gemm --num-layers 48",
        "--num-layers",
        "expected 45, which the config needs, found 48",
    ),
    "rotary base": (
        "--moe-grouped-gemm",
        "--rotary-base 10000",
        "--rotary-base",
        "leave it out, each layer has its own",
    ),
    "window": ("--moe-grouped-gemm", "--window-size 511,0", "--window-size", "found (511, 0)"),
    "rope scaling": (
        "--moe-grouped-gemm",
        "--use-rope-scaling",
        "--use-rope-scaling",
        "leave it out",
    ),
    "tensor parallel": (
        "--tensor-model-parallel-size 1",
        "--tensor-model-parallel-size 16 --sequence-parallel",
        "--tensor-model-parallel-size",
        "a divisor of num_attention_groups=8",
    ),
    "no sequence parallel": (
        "--tensor-model-parallel-size 1",
        "--tensor-model-parallel-size 2",
        "--sequence-parallel",
        "found none; add it",
    ),
    "product": (
        "--context-parallel-size 8",
        "--context-parallel-size 16",
        "--tensor-model-parallel-size, --pipeline-model-parallel-size, --context-parallel-size",
        "1 x 8 x 16 = 128",
    ),
    "experts": (
        "--expert-model-parallel-size 8",
        "--expert-model-parallel-size 5",
        "--expert-model-parallel-size",
        "a divisor of moe_num_experts=288, found 5",
    ),
    "expert ranks": (
        "--expert-tensor-parallel-size 1",
        "--expert-tensor-parallel-size 2",
        "--expert-model-parallel-size, --expert-tensor-parallel-size, "
        "--pipeline-model-parallel-size",
        "8 x 2 x 8 = 128",
    ),
    "ring with a window": (
        "CP_COMM_TYPES+=(a2a a2a a2a p2p)",
        "CP_COMM_TYPES+=(a2a a2a p2p p2p)",
        "--cp-comm-type",
        "found p2p in 3,7",
    ),
    "short list": ("for _ in {1..11}", "for _ in {1..10}", "--cp-comm-type", "found 41"),
    "groups of a2a": (
        "--context-parallel-size 8",
        "--context-parallel-size 32",
        "--cp-comm-type",
        "1 x 32",
    ),
    "layers in the layout": (
        "Ett|(tt|)*21t|mmmL",
        "Ett|(tt|)*21|mmmL",
        "--pipeline-model-parallel-layout",
        "45 decoder layers (t), not 44",
    ),
    "letters of the layout": (
        "Ett|(tt|)*21t|mmmL",
        "Ett|(xx|)*21t|mmmL",
        "--pipeline-model-parallel-layout",
        "layout",
    ),
    "stages without a layout": (
        "--pipeline-model-parallel-layout 'Ett|(tt|)*21t|mmmL'",
        "",
        "--pipeline-model-parallel-size",
        "a divisor of 45 layers",
    ),
    "virtual stages": (
        "--pipeline-model-parallel-layout 'Ett|(tt|)*21t|mmmL'",
        "--num-virtual-stages-per-pipeline-rank 3 --decoder-first-pipeline-num-layers 10",
        "--num-virtual-stages-per-pipeline-rank",
        "10",
    ),
    "sequence and ranks": (
        "--seq-length 131072",
        "--seq-length 131080",
        "--seq-length",
        "a multiple of 2 x --context-parallel-size = 16, found 131080; use 131072",
    ),
    "positions": (
        "--seq-length 131072",
        "--seq-length 524288",
        "--seq-length",
        "at most --max-position-embeddings 262144",
    ),
    "own positions": (
        "--seq-length 131072",
        "--seq-length 131072 --max-position-embeddings 32768",
        "--seq-length",
        "leave --max-position-embeddings out",
    ),
    "batch": (
        "--global-batch-size 32",
        "--global-batch-size 33 --micro-batch-size 2",
        "--global-batch-size",
        "a multiple of --micro-batch-size 2 x 1",
    ),
    "batch of virtual stages": (
        "--global-batch-size 32",
        "--global-batch-size 4",
        "--global-batch-size",
        "micro-batches in groups of 8",
    ),
    "packed batch": (
        "--micro-batch-size 1",
        "--sft --micro-batch-size 2",
        "--micro-batch-size",
        "expected 1 with --sft, found 2",
    ),
    "mean over ranks": (
        "--micro-batch-size 1",
        "--sft --micro-batch-size 1",
        "--calculate-per-token-loss",
        "found none; add it",
    ),
    "no batch": ("--micro-batch-size 1", "", "--micro-batch-size", "1 or more, found none"),
    "balancing": (
        "--moe-grouped-gemm",
        "--moe-aux-loss-coeff 1e-3",
        "--moe-aux-loss-coeff",
        "expected 0 with moe_router_load_balancing_type none",
    ),
    "fp8": (
        "--moe-grouped-gemm",
        "--fp8-format hybrid --sequence-parallel --tensor-model-parallel-size 8",
        "--fp8-format",
        "step35-gate-layout expanded",
    ),
    "window of the checkpoint": (
        "--moe-grouped-gemm",
        "--step35-window steptrn",
        "--step35-window",
        "expected one of hf, steptron",
    ),
    "decay without weight": (
        "--weight-decay 0.1",
        "--weight-decay 0",
        "--weight-decay",
        "more than 0 with --step35-decay-1d",
    ),
    "patch switched off": (
        "export STEP35_PATCH=1",
        "export STEP35_PATCH=0",
        "STEP35_PATCH",
        "without which stock Megatron-Core builds another model",
    ),
    "patch not exported": ("export STEP35_PATCH=1", "STEP35_PATCH=1", "STEP35_PATCH", "found none"),
    "no config": (
        "export STEP35_CONFIG=/models/Step-3.5-Flash",
        "",
        "STEP35_CONFIG",
        "without which the patch is inert",
    ),
    "gate layout": (
        "export STEP35_PATCH=1",
        "export STEP35_PATCH=1 STEP35_GATE_LAYOUT=wide",
        "STEP35_GATE_LAYOUT",
        "headwise or expanded, found wide",
    ),
    "comment in a command": (
        '    "${DATA_ARGS[@]}" \\',
        "    # data \\\n    --train-iters 3 \\",
        "--train-iters",
        "a command of its own (arrays.sh, line 54)",
    ),
    "empty word": ('    "$@"', '    "$@" ""', "''", "quotes around an empty variable"),
    "YAML": (
        "--moe-grouped-gemm",
        "--yaml-cfg /models/args.yaml",
        "--yaml-cfg",
        "the shapes come from the config",
    ),
    "upstream's own": (
        "--save-interval 100",
        "--save-interval 0",
        "--save-interval",
        "args.save_interval > 0",
    ),
    "unknown number": (
        "--train-iters 1400",
        "--train-iters $ITERATIONS",
        "--train-iters",
        "give --set ITERATIONS=VALUE",
    ),
}


MANY = ("misspelt", "no number", "no sequence parallel", "experts", "short list", "positions")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(config, tmp_path, name):
    old, new, argument, words = MISTAKES[name]
    source = (SCRIPTS / "arrays.sh").read_text()
    assert source.count(old) == 1
    path = tmp_path / "arrays.sh"
    path.write_text(source.replace(old, new))
    found = {problem.argument: problem for problem in checked(config, path).problems}
    assert argument in found, sorted(found)
    assert words in str(found[argument])
    assert all(problem.fix for problem in found.values())


@pytest.mark.megatron
def test_all_mistakes_come_at_once(config, tmp_path):
    source = (SCRIPTS / "arrays.sh").read_text()
    for name in MANY:
        source = source.replace(*MISTAKES[name][:2])
    (tmp_path / "many.sh").write_text(source)
    found = {problem.argument for problem in checked(config, tmp_path / "many.sh").problems}
    assert {MISTAKES[name][2] for name in MANY} <= found


def test_number_of_gpus(config):
    assert checked(config, SCRIPTS / "arrays.sh", gpus=64).problems == []
    [problem] = checked(config, SCRIPTS / "arrays.sh", gpus=32, NNODES="8").problems[:1]
    assert "found 8 x 8 = 64" in str(problem)
    [first, *_] = checked(config, SCRIPTS / "arrays.sh", NNODES="7").problems
    assert "a product that divides 56 processes" in str(first)


def test_a_stage_has_the_layers_that_the_layout_says(config):
    stages = checked(config, SCRIPTS / "arrays.sh").stages
    assert [(stages[0].pp, stages[0].vpp, stages[0].layers)] == [(0, 0, (0, 1))]
    assert (stages[8].pp, stages[8].vpp, stages[8].layers) == (0, 1, (16, 17))
    assert (stages[-1].pp, stages[-1].vpp, stages[-1].layers) == (7, 2, (45, 46, 47))


def test_choices_that_nobody_made_are_noted(config, tmp_path):
    source = (SCRIPTS / "arrays.sh").read_text()
    path = tmp_path / "notes.sh"
    path.write_text(
        source.replace("--adam-beta2 0.95", "")
        .replace("--weight-decay 0.1", "--moe-router-bias-update-rate 1e-3 --weight-decay 0.1")
        .replace("--seq-length 131072", "--seq-length 256 --seq-length 16")
    )
    notes = "\n".join(checked(config, path).notes)
    for line in (
        "--adam-beta2 is not given, and 0.999 by Megatron's default; the authors train with 0.95",
        "differs from the published model: moe_router_bias_update_rate=0.001",
        "--seq-length is given twice, as 256 and 16: the last one counts",
        "--seq-length 16 is below the sliding window of 512 tokens",
    ):
        assert line in notes


def test_commands_are_read_without_a_script(config):
    words = "STEP35_PATCH=1 torchrun --nproc-per-node 8 pretrain_gpt.py --bf16".split()
    found = {problem.argument for problem in check(config, from_words(words)).problems}
    assert "STEP35_CONFIG" in found
    assert "STEP35_PATCH" not in found
    only = check(config, from_words(["--seq-length", "8"]), gpus=8)
    assert {problem.argument for problem in only.problems} == {"--micro-batch-size"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x00\x01", "found a binary file"),
        (b"\xff\xfe\xfa", "found no UTF-8 text"),
        (b"tensor_model_parallel_size: 2\nmodel:\n  layers: 45\n", "expected a call of torchrun"),
        (b"echo hello\nls -l\n", "found that it starts nothing"),
        (b"for x in 1 2; do\n", "no bash that could be read"),
        (b"while true; do sleep 1; done\n", "a loop without an end"),
        (b"f() { f; }; f\n", "calls itself"),
        (b"torchrun a.py\ntorchrun b.py --x 1\n", "say which one is meant by --call N"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "script"
    path.write_bytes(content)
    with pytest.raises(UnreadableLaunch, match=re.escape(message)):
        chosen(read_script(path)[0], str(path), None)


@pytest.mark.slow
def test_exit_statuses_and_output_of_the_command(tmp_path):
    """For real: JSON alone on standard output, nothing on it where the input cannot be read."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "step35_patch.cli", "check", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    good = run("step-3.5-flash", "--script", str(SCRIPTS / "arrays.sh"), "--json")
    assert good.returncode == 0, good.stderr
    answer = json.loads(good.stdout)
    assert answer["ok"]
    assert answer["problems"] == []
    assert answer["stages"][-1] == {"pp": 7, "vpp": 2, "layers": [45, 46, 47]}
    wrong = run("step-3.5-flash", "--json", "--", "--num-layers", "3")
    assert wrong.returncode == 1
    first = json.loads(wrong.stdout)["problems"][0]
    assert set(first) == {"argument", "expected", "found", "fix"}
    for words in (
        ["step-3.5-flash", "--script", str(tmp_path / "none.sh")],
        ["step-3.5-flash", "--script", str(tmp_path)],
        [str(tmp_path / "none.json"), "--", "--bf16"],
        ["step-3.5-flash"],
    ):
        unread = run(*words)
        assert unread.returncode == 2, words
        assert unread.stdout == ""
        assert 1 <= len(unread.stderr.splitlines()) <= 2, unread.stderr


# Script, its own arguments, GiB of a GPU; what is printed of it is in golden/.
GOLDEN = {
    "right": ("arrays.sh", [], 110.0, ()),
    "many mistakes": ("arrays.sh", [], None, MANY),
    "another container": ("entrypoint.sh", ["--nodes", "2"], 80.0, ()),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_printed(config, tmp_path, capsys, name):
    """Whole outputs, for a reader; `UPDATE_GOLDEN=1` writes them anew."""
    script, arguments, memory, mistakes = GOLDEN[name]
    source = (SCRIPTS / script).read_text()
    for mistake in mistakes:
        source = source.replace(*MISTAKES[mistake][:2])
    (tmp_path / script).write_text(source)
    calls, notes = read_script(tmp_path / script, arguments)
    report = check(config, chosen(calls, script, None), gpu_memory=memory, loose=loose_words(calls))
    report.notes[:0] = notes
    print_report(report, config)
    printed = capsys.readouterr().out
    golden = Path(__file__).parent / "golden" / f"{name.replace(' ', '_')}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(printed)
    assert printed == golden.read_text()


def test_memory_of_the_fullest_rank(config):
    calls, _ = read_script(SCRIPTS / "arrays.sh")
    command = chosen(calls, "arrays.sh", None)
    report = check(config, command, gpu_memory=80)
    [problem] = report.problems
    needed = report.estimate.memory / 2**30
    assert f"{needed:.1f} GiB on pipeline rank 7" in str(problem)
    assert check(config, command, gpu_memory=needed + 0.1).problems == []


def test_a_contradicted_shape_brings_no_other_problem(config):
    words = (SCRIPTS / "arrays.sh", "--num-layers", "3", "--num-attention-heads", "7")
    found = {problem.argument for problem in checked(config, *words).problems}
    assert found == {"--num-layers", "--num-attention-heads"}
