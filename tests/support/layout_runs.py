"""Runs of the example training script under torchrun, and what their logs say.

One checkpoint is made first, from which every layout starts: a random start is drawn differently
under pipeline and expert parallelism.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from step35_patch.arguments import CPU_ARGUMENTS
from support import implementation
from support.figures import record
from support.ranks import Ranks
from support.reference import tiny_config
from support.stored import stored_tensors

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_step35.py"
# Runs an unmodified script of Megatron-LM's on the CPU.
REAL_SCRIPT = Path(__file__).with_name("real_script.py")
SEQ_LENGTH, ITERATIONS = 64, 20

# Name: (processes, arguments)
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "vpp": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3"),
    "uneven pp": (
        2,
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 "
        "--decoder-last-pipeline-num-layers 2",
    ),
    "no decoder layer on the last stage": (
        2,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*6|mmL",
    ),
    "mtp layers alone between": (
        4,
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Ett|tttt|mm|L",
    ),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "cp2": (2, "--context-parallel-size 2"),
    "dp2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "full recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "selective recompute": (
        1,
        "--recompute-granularity selective --recompute-modules core_attn moe mlp",
    ),
    "tp2 ep2 etp1": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
    ),
    "tp2 pp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    ),
    "tp2 cp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2",
    ),
}

_LINE = re.compile(
    r"iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|(.*?)grad norm: (\S+) \|", re.DOTALL
)
_MTP = re.compile(r"mtp_\d+ loss: (\S+)")


# The authors' Muon, in fp32, and their weight decay.
MUON = """
    --optimizer muon --muon-momentum 0.95 --muon-coefficient-type polar_express
    --muon-num-ns-steps 6 --muon-scale-mode spectral --muon-extra-scale-factor 0.2
    --muon-tp-mode duplicated --muon-fp32-matmul-prec high --step35-decay-1d
    """.split()


@dataclass(frozen=True)
class Iteration:
    """What Megatron logged of one: losses in nats a token, the gradients' norm before clipping."""

    loss: float
    mtp_losses: tuple[float, ...]
    grad_norm: float


def layout_config() -> dict:
    """A tiny config that tensor parallelism can divide by four, for byte tokens."""
    other = {"attention_type": "sliding_attention", "num_attention_heads": 8}
    return tiny_config(
        vocab_size=256,
        pad_token_id=0,
        hidden_size=32,
        head_dim=8,
        num_attention_heads=4,
        num_attention_groups=4,
        attention_other_setting=other | {"num_attention_groups": 4, "head_dim": 8},
        sliding_window=12,
    )


def arguments(iterations: int = ITERATIONS) -> list[str]:
    """Megatron's arguments of every run; the model's shape comes from the config."""
    return [
        *CPU_ARGUMENTS,
        *f"""
        --tokenizer-type NullTokenizer --seq-length {SEQ_LENGTH} --num-workers 0
        --micro-batch-size 2 --global-batch-size 4 --train-iters {iterations}
        --lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --clip-grad 0.5 --seed 7
        --moe-router-bias-update-rate 0 --moe-token-dispatcher-type alltoall
        --eval-iters 0 --eval-interval 1000 --log-interval 1
        --ckpt-format torch_dist --no-create-attention-mask-in-dataloader
        """.split(),
    ]


def on_engine(words: list[str]) -> list[str]:
    """The same on Transformer Engine, with grouped GEMMs and fused weight gradients."""
    words = [word for word in words if word != "--no-gradient-accumulation-fusion"]
    return [*words, "--transformer-impl", "transformer_engine", "--moe-grouped-gemm"]


def _stand_in(words: tuple[str, ...]) -> dict[str, str]:
    """The variables with which `support.implementation` lets a run have what it asks for."""
    return {implementation.VARIABLE: "transformer_engine"} if "transformer_engine" in words else {}


def run(
    config: Path,
    *more: str,
    processes: int = 1,
    script: Path = SCRIPT,
    python_path: tuple[Path, ...] = (),
    timeout: int = 900,
) -> str:
    """The output of a script, run to its end by torchrun; `python_path` goes before all else.

    Raises:
        RuntimeError: it did not end with status 0; carries the end of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), *more]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(*python_path) | _stand_in(more) | {"STEP35_CONFIG": str(config)},
        timeout=timeout,
        check=False,
    )
    output = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{output[-6000:]}")
    return output


# A Megatron-Core that is none of the tested ones is tested too, by `./run canary`.
UNTESTED = "STEP35_ALLOW_UNTESTED"


def environment(*python_path: Path) -> dict[str, str]:
    """Of a script's run on the CPU; `python_path` goes before all else."""
    return {
        **{n: v for n, v in os.environ.items() if not n.startswith("STEP35_") or n == UNTESTED},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(
            [
                *map(str, python_path),
                str(SCRIPT.parents[1]),
                os.environ.get("PYTHONPATH", ""),
                str(Path(__file__).parents[1]),
            ]
        ),
        # Megatron-LM makes its dataset helper with the python3 and python3-config of PATH.
        "PATH": os.pathsep.join(
            [
                str(Path(sys.executable).parent),
                str(Path(sys.base_prefix) / "bin"),
                os.environ["PATH"],
            ]
        ),
    }


# What processes do once from which runs of scripts are forked, and what each run does of
# `arguments`: step35_patch has no model in the former, and is activated anew in each of the latter.
IMPORTS = """
import torch._dynamo, torch.distributed.checkpoint
from step35_patch import cpu
cpu.install()
import megatron.training
"""
FORKED = """
import runpy, sys
if "megatron" in sys.modules:
    import step35_patch
    step35_patch.deactivate()
    step35_patch.activate()
if "transformer_engine" in arguments:
    from support import implementation
    implementation.install(cudnn=True)
sys.argv = arguments
sys.path[0] = arguments[0].rpartition("/")[0]
runpy.run_path(arguments[0], run_name="__main__")
"""


class ForkedRuns:
    """Runs of the example script whose ranks are forked from a process that has done the imports.

    (`run` starts scripts as users do: Megatron-Core is patched as they import it.) Where
    Transformer Engine is tested, Megatron-Core is imported in the ranks, because not all of them
    are to have the stand-in.
    """

    def __init__(self, folder: Path):
        first = "import torch._dynamo, torch.distributed.checkpoint"
        imports = first if implementation.ON_TRANSFORMER_ENGINE else IMPORTS
        self.ranks = Ranks(folder, imports, environment())

    def run(self, config: Path, *more: str, processes: int = 1) -> str:
        """As `run`, with ranks forked from one process for all runs."""
        arguments = SCRIPT, *more
        variables = {"STEP35_CONFIG": str(config), **_stand_in(more)}
        ended = self.ranks.run(FORKED, processes, *arguments, **variables)
        if any(ended.statuses):
            raise RuntimeError(f"{arguments}: {ended.statuses}\n{ended.text[-6000:]}")
        return ended.text


def iterations(output: str) -> dict[int, Iteration]:
    """What was logged, by iteration."""
    return {
        int(number): Iteration(
            float(loss), tuple(float(x) for x in _MTP.findall(rest)), float(norm)
        )
        for number, loss, rest, norm in _LINE.findall(output)
    }


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(layout_config()))
    return path


def assert_same_training(
    found: dict[int, Iteration], expected: dict[int, Iteration], tolerance: float = 2e-5
) -> None:
    """Losses agree within fp32 rounding at every iteration, gradient norms to the log's digits."""
    assert sorted(found) == sorted(expected)
    for number, wanted in expected.items():
        got = found[number]
        assert len(got.mtp_losses) == len(wanted.mtp_losses), number
        pairs = zip((got.loss, *got.mtp_losses), (wanted.loss, *wanted.mtp_losses), strict=True)
        for loss, wanted_loss in pairs:
            off = abs(loss / wanted_loss - 1)
            assert off < tolerance, (number, got, wanted)
            record("training losses", off)
        assert abs(got.grad_norm - wanted.grad_norm) < 2e-3, (number, got, wanted)


def checkpoint_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All tensors of a torch_dist checkpoint, optimizer's state included."""
    return stored_tensors(folder / f"iter_{iteration:07d}")
