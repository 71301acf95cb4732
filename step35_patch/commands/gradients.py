"""`step35-patch verify --gradients`: a parallel layout's gradients against one process's.

The model is shrunk to a size for a CPU, with its layers as they are, gets random weights, and is
trained for one iteration by the example script under torchrun: once with the layout, once without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step35_patch.arguments import CPU_ARGUMENTS
from step35_patch.commands.demo import example_script
from step35_patch.commands.demo_training import DemoError
from step35_patch.config.model import Step35Config
from step35_patch.costs.launch import fewest_ranks
from step35_patch.launch.shrinking import length_for, shrunk

# Of each gradient, as a part of its largest value; found are some 1e-6.
TOLERANCE = 1e-3
_MICRO_BATCHES = 4  # at least: two can hide a broken pipeline schedule

# What says how a model is trained and not what is computed: left out of the run with one process.
_VALUES = (
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
    *("--context-parallel-size", "--expert-model-parallel-size", "--expert-tensor-parallel-size"),
    *("--pipeline-model-parallel-layout", "--num-virtual-stages-per-pipeline-rank"),
    *("--num-layers-per-virtual-pipeline-stage", "--decoder-first-pipeline-num-layers"),
    *("--decoder-last-pipeline-num-layers", "--microbatch-group-size-per-virtual-pipeline-stage"),
    *("--recompute-granularity", "--recompute-method", "--recompute-num-layers"),
    *("--moe-token-dispatcher-type", "--ddp-bucket-size", "--ddp-num-buckets"),
)
_FLAGS = (
    *("--sequence-parallel", "--use-distributed-optimizer", "--overlap-grad-reduce"),
    *("--overlap-param-gather", "--no-overlap-p2p-communication", "--recompute-activations"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
)
_LISTS = ("--recompute-modules", "--cp-comm-type")
_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LOGGED = re.compile(r"(lm loss|mtp_\d+ loss|\w*(?:balancing|z)_loss|grad norm): (\S+) \|")


@dataclass(frozen=True)
class Layout:
    """A parallel layout, read from Megatron's arguments.

    Attributes:
        arguments: as they were given.
        others: those of them that one process gets too.
        processes: how many it has.
        replicas: its data-parallel size.
        tp, pp, cp, ep: its parallel sizes.
    """

    arguments: list[str]
    others: list[str]
    processes: int
    replicas: int
    tp: int
    pp: int
    cp: int
    ep: int


class GradientsError(Exception):
    """Nothing could be compared; says why."""


def read_layout(arguments: list[str], processes: int | None) -> Layout:
    """The layout of Megatron's arguments.

    Args:
        arguments: of the layout; others that change what is trained may be among them.
        processes: how many; None for as few as it needs.

    Raises:
        GradientsError: the sizes do not go with the number of processes, or another precision
            than fp32 is asked for.
    """
    if halves := {"--bf16", "--fp16"} & set(arguments):
        raise GradientsError(
            f"{' '.join(sorted(halves))}: gradients are compared in fp32; leave it out"
        )
    parser = argparse.ArgumentParser(prog="--", allow_abbrev=False, add_help=False)
    for option in _VALUES:
        parser.add_argument(option)
    for option in _FLAGS:
        parser.add_argument(option, action="store_true")
    for option in _LISTS:
        parser.add_argument(option, nargs="+")
    known, others = parser.parse_known_args(arguments)
    tp, pp, cp, ep = (
        int(getattr(known, f"{name}_parallel_size") or 1)
        for name in ("tensor_model", "pipeline_model", "context", "expert_model")
    )
    etp = int(known.expert_tensor_parallel_size or tp)
    fewest = fewest_ranks(tensor=tp, pipeline=pp, context=cp, expert=ep, expert_tensor=etp)
    count = fewest if processes is None else processes
    if count % fewest:
        raise GradientsError(f"--processes: expected a multiple of {fewest}, found {count}")
    return Layout(arguments, others, count, count // (tp * pp * cp), tp, pp, cp, ep)


@dataclass(frozen=True)
class Difference:
    """One tensor's gradient, against one process's.

    Attributes:
        name: The published one.
        rank: Where it is farthest off; None if no rank has it.
        largest: The largest difference, of the largest value; infinite where there is no number.
    """

    name: str
    rank: int | None
    largest: float


def run(hf_dir: str, arguments: list[str], processes: int | None) -> int:
    """Compare and print.

    Returns:
        The exit status: 0 if every gradient agrees, 1 if one does not or a run failed, 2 if the
        layout or the config can't be used.

    Args:
        hf_dir: a folder with a config.json; its weights are not read.
        arguments: Megatron's, of the layout.
        processes: how many; None for as few as the layout needs.
    """
    try:
        layout = read_layout(arguments, processes)
        config = Step35Config.from_dict(
            shrunk(
                Step35Config.from_pretrained(hf_dir),
                tensor=layout.tp,
                expert=layout.ep,
                length=length_for(tensor=layout.tp, context=layout.cp),
            )
        )
        with tempfile.TemporaryDirectory(prefix="step35-gradients-") as folder:
            return _compare(config, layout, Path(folder))
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    except (GradientsError, ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2


def _compare(config: Step35Config, layout: Layout, folder: Path) -> int:
    micro_batches = -(-_MICRO_BATCHES // layout.pp) * layout.pp
    _write_weights(config, folder)
    print(
        f"{config.num_hidden_layers} decoder layers and {config.num_nextn_predict_layers} MTP "
        f"layers, hidden size {config.hidden_size}, fp32 on the CPU; {layout.processes} "
        f"process(es), {layout.replicas} model(s) side by side, {micro_batches} micro-batches each",
        flush=True,
    )
    runs = {}
    for name, count, words in (
        ("one process", 1, layout.others),
        ("layout", layout.processes, layout.arguments),
    ):
        out = folder / name.split()[0]
        samples = micro_batches * layout.replicas
        length = length_for(tensor=layout.tp, context=layout.cp)
        runs[name] = _train(folder, out, count, samples, length, words)
    for name, wanted in runs["one process"].items():
        print(_line(name, runs["layout"].get(name, math.nan), wanted))
    print(_line("norm of these gradients", _norm(folder / "layout"), _norm(folder / "one")))
    found = differences(folder / "one", folder / "layout")
    print(f"{len(found)} gradients compared; the worst, of their largest value:")
    for tensor in found[:5]:
        where = "on no rank" if tensor.rank is None else f"rank {tensor.rank}"
        print(f"  {tensor.largest:9.1e}  {tensor.name} ({where})")
    worst = found[0]
    agrees = worst.largest < TOLERANCE
    print(
        f"{'AGREE' if agrees else 'DIFFER'}: {worst.name} is off by {worst.largest:.1e} of its "
        f"largest (tolerance {TOLERANCE:g})"
    )
    return int(not agrees)


def _line(name: str, found: float, wanted: float) -> str:
    return f"{name:<28}{found:>14.6f}   in one process {wanted:.6f}"


def _write_weights(config: Step35Config, folder: Path) -> None:
    """Random weights, large enough to show errors, and the config."""
    import torch
    from safetensors.torch import save_file

    from step35_patch.tensors.published import published_tensors
    from step35_patch.tensors.table import EMBEDDING

    generator = torch.Generator().manual_seed(1)
    weights = {}
    for info in published_tensors(config):
        noise = torch.randn(info.shape, generator=generator)
        if len(info.shape) == 1:  # norms and routers' biases
            noise *= 0.1
        elif info.name != EMBEDDING:
            noise /= info.shape[-1] ** 0.5
        weights[info.name] = noise
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def _train(
    folder: Path, out: Path, processes: int, samples: int, length: int, words: list[str]
) -> dict[str, float]:
    """Train one iteration; what Megatron logged of it."""
    out.mkdir()
    training = f"""
        --tokenizer-type NullTokenizer --seq-length {length} --num-workers 0
        --micro-batch-size 1 --global-batch-size {samples} --train-iters 1
        --lr 1e-3 --lr-decay-style constant --seed 7 --clip-grad 1.0
        --moe-router-bias-update-rate 0 --moe-token-dispatcher-type alltoall
        --eval-iters 0 --eval-interval 1000 --log-interval 1
        --no-create-attention-mask-in-dataloader
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "step35_patch.verify.gradient_rank"]
    command += [str(example_script()), str(folder), str(out), *CPU_ARGUMENTS, *training.split()]
    ended = subprocess.run(  # noqa: S603  # nosec B603  # the command's own, no shell
        [*command, *words],
        env={n: v for n, v in os.environ.items() if n not in _LAUNCHERS}
        | {
            "STEP35_CONFIG": str(folder / "config.json"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        tail = "\n".join((ended.stdout + ended.stderr).splitlines()[-40:])
        raise GradientsError(
            f"training with {processes} process(es) ended with status {ended.returncode}:\n{tail}"
        )
    return {name: float(value) for name, value in _LOGGED.findall(ended.stdout)}


def _ranks(folder: Path) -> list[dict[str, Any]]:
    """Each rank's gradients, in the ranks' order."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("-")[1]))
    return [load_file(file) for file in files]


def differences(reference: Path, layout: Path) -> list[Difference]:
    """Every gradient of one process, on the rank where it is farthest off, the worst first.

    Args:
        reference: the folder of the run with one process.
        layout: that of the layout.
    """
    (wanted,) = _ranks(reference)
    found = _ranks(layout)
    worst = [
        max(
            (
                Difference(name, rank, _difference(own[name], gradient))
                for rank, own in enumerate(found)
                if name in own
            ),
            key=lambda difference: difference.largest,
            default=Difference(name, None, math.inf),
        )
        for name, gradient in wanted.items()
    ]
    return sorted(worst, key=lambda difference: -difference.largest)


def _difference(found: Any, wanted: Any) -> float:
    largest = (found - wanted).abs().max().item() / (wanted.abs().max().item() or 1.0)
    return largest if largest == largest else math.inf


def _norm(folder: Path) -> float:
    """Of all gradients, each counted once."""
    unique: dict[str, Any] = {}
    for own in _ranks(folder):
        unique |= own
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in unique.values()))
