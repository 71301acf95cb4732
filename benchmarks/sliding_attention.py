"""Forward and backward of a sliding layer's core attention on torch, over sequence lengths.

Compared, on the same inputs and the same gradient of the output:

- `step35_patch`: `Step35DotProductAttention`.
- `megatron_core`: Megatron-Core's own local `DotProductAttention`, given the sliding mask (released
  versions build that mask on "cuda" in every forward; here it is made once and not timed).
- `sdpa_full_mask`: `scaled_dot_product_attention` with the S x S boolean mask, also made once.

The shape is one rank's share of the published sliding layer (96 query heads, 8 groups, head
dimension 128, window 512) under tensor parallelism 16: 6 query heads, 1 group, batch 1. At 16k
Megatron-Core's scores of 6 heads do not fit a small machine, so that this length is measured with 1
head also. What does not fit is recorded as out of memory.

Each implementation runs in a process of its own. A round runs every case once, the implementations
one right after the other; shown are median, 20th and 80th percentile of the rounds, and the same
of the ratios within a round, which a busy machine disturbs less than the times. Norms
of output and gradients must agree in the first round. Peak memory is the largest resident size
during forward and backward, beyond inputs and mask.

Not covered: GPUs, Transformer Engine, masks beyond the window, packed sequences, dropout, the rest
of the layer, and the precision that fp16 and bf16 lose (tests/model/test_windowed_attention.py).

Needs Linux, for its memory accounting. Run it from the repository with the package and
Megatron-Core importable:

    python benchmarks/sliding_attention.py            # some 15 minutes on 2 cores
    python benchmarks/sliding_attention.py --quick    # 1k and 2k, fp32, a minute; writes no file

The result file has one row for each case and implementation: `over_step35_patch` is its time over
ours, `over_half_length` its time over its own at half the length.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("step35_patch", "megatron_core", "sdpa_full_mask")
WINDOW = 512
HEAD_DIM = 128
GROUPS = 1
RESULTS = Path(__file__).parent / "results" / "sliding_attention.csv"

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# --- Worker: one implementation -------------------------------------------------------------------


def layer_config(dtype: str, heads: int, **changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        bf16=dtype == "bfloat16",
        **changes,
    )


def step35_patch(dtype: str, heads: int) -> Attention:
    from megatron.core.transformer.enums import AttnMaskType

    from step35_patch.model.core_attention import Step35DotProductAttention

    config = layer_config(dtype, heads, window_size=(WINDOW - 1, 0))
    module = Step35DotProductAttention(config, 1, AttnMaskType.causal, "self")
    return lambda q, k, v, mask: module(q, k, v, None)


def megatron_core(dtype: str, heads: int) -> Attention:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        # Its score buffer is allocated on this device.
        torch.cuda.current_device = lambda: "cpu"
    parallel_state.get_global_memory_buffer().buffer.clear()
    config = layer_config(dtype, heads)
    # Else it asks for CUDA's generator before a dropout of 0, which draws nothing.
    config.sequence_parallel = True
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


def sdpa_full_mask(dtype: str, heads: int) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        # One group: its keys serve all heads, by stride, which was faster than enable_gqa.
        key, value = (x.expand(-1, -1, heads, -1) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    return attention


def sliding_mask(s: int) -> Tensor:
    """[1, 1, s, s], True where hidden."""
    visible = torch.ones(s, s, dtype=torch.bool).tril_().triu_(1 - WINDOW)
    return visible.logical_not_()[None, None]


def measure(implementation: str, dtype: str, heads: int, s: int) -> dict:
    attention = globals()[implementation](dtype, heads)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(s, 1, n, HEAD_DIM, generator=generator).to(getattr(torch, dtype))
        for n in (heads, GROUPS, GROUPS, heads)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = None if implementation == "step35_patch" else sliding_mask(s)
    reset_peak()
    before = status_kib("VmRSS")
    start = time.perf_counter()
    out = attention(*inputs, mask)
    forward = time.perf_counter() - start
    out.backward(grad.flatten(2))
    total = time.perf_counter() - start
    return {
        "forward_s": forward,
        "total_s": total,
        "peak_mib": (status_kib("VmHWM") - before) / 1024,
        "check": [x.double().square().sum().item() for x in (out, *(y.grad for y in inputs))],
    }


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: expected {field}, found none. This needs Linux.")


def reset_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # else what the last run left behind would serve this one
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, see proc_pid_clear_refs(5)


def work(implementation: str, memory_gib: float) -> None:
    """Answers each JSON line [dtype, heads, s] on stdin by one on stdout."""
    for dtype in ("float32", "bfloat16"):  # kernels are chosen and set up at first use
        measure(implementation, dtype, 2, 1024)
    # Allocations beyond fail cleanly, and the machine stays usable.
    limit = status_kib("VmSize") * 1024 + int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("{}", flush=True)
    for line in sys.stdin:
        try:
            result = measure(implementation, *json.loads(line))
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            result = {"out_of_memory": True}
        print(json.dumps(result), flush=True)


# --- Parent ---------------------------------------------------------------------------------------


class Worker:
    def __init__(self, implementation: str, memory_gib: float) -> None:
        threads = str(torch.get_num_threads())
        arguments = ["--worker", implementation, "--threads", threads]
        arguments += ["--memory-gib", str(memory_gib)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, case: tuple[str, int, int]) -> dict:
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return self.answer()


def run(cases: list[tuple[str, int, int]], rounds: int, memory_gib: float) -> dict:
    """Results by (implementation, case), one for each round."""
    workers = {name: Worker(name, memory_gib) for name in IMPLEMENTATIONS}
    results = {(name, case): [] for case in cases for name in IMPLEMENTATIONS}
    for number in range(rounds):
        for case in cases:
            for name, worker in workers.items():
                done = results[name, case]
                if not done or "out_of_memory" not in done[0]:
                    done.append(worker.measure(case))
            if number == 0:
                compare(case, {name: results[name, case][0] for name in IMPLEMENTATIONS})
            print(f"round {number + 1} of {rounds}: {case} done", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()
    return {key: [] if "out_of_memory" in done[0] else done for key, done in results.items()}


def compare(case: tuple[str, int, int], results: dict[str, dict]) -> None:
    """Squared norms of output and gradients must agree: a fast wrong answer is no result."""
    expected = results["step35_patch"]["check"]
    for name, result in results.items():
        for ours, theirs in zip(expected, result.get("check", expected), strict=True):
            if abs(theirs / ours - 1) > (1e-4 if case[0] == "float32" else 2e-2):
                raise RuntimeError(f"{case}: {name} and step35_patch disagree: {results}")


def spread(values: list[float]) -> list[float]:
    """20th percentile, median, 80th percentile."""
    if len(values) == 1:
        return values * 3
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return [low, statistics.median(values), high]


def times(done: list[dict], key: str) -> list[float]:
    return spread([x[key] for x in done]) if done else []


def ratios(over: list[dict], under: list[dict]) -> list[float]:
    return (
        spread([a["total_s"] / b["total_s"] for a, b in zip(over, under, strict=False)])
        if over
        else []
    )


def environment() -> dict[str, str]:
    import megatron.core

    import step35_patch

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    return {
        "date": datetime.date.today().isoformat(),
        "step35_patch": step35_patch.__version__,
        "megatron_core": megatron.core.__version__,
        "torch": torch.__version__,
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
    }


def table(cases: list[tuple[str, int, int]], results: dict) -> list[dict[str, str]]:
    """A row for each case and implementation, without the environment."""

    def columns(name: str, values: list[float], digits: int) -> dict[str, str]:
        values = values or [""] * 3
        return {
            f"{name}_{p}": f"{value:.{digits}f}" if values[0] != "" else ""
            for p, value in zip(("p20", "p50", "p80"), values, strict=True)
        }

    rows = []
    for case in cases:
        dtype, heads, s = case
        for name in IMPLEMENTATIONS:
            done = results[name, case]
            half = results.get((name, (dtype, heads, s // 2)), [])
            peak = max((x["peak_mib"] for x in done), default=None)
            rows.append(
                {
                    "dtype": dtype,
                    "query_heads": str(heads),
                    "groups": str(GROUPS),
                    "head_dim": str(HEAD_DIM),
                    "window": str(WINDOW),
                    "seq_len": str(s),
                    "implementation": name,
                    "rounds": str(len(done)),
                    "status": "ok" if done else "out of memory",
                    **columns("forward_ms", [1e3 * x for x in times(done, "forward_s")], 1),
                    **columns("total_ms", [1e3 * x for x in times(done, "total_s")], 1),
                    "peak_mib": "" if peak is None else f"{peak:.0f}",
                    **columns("over_step35_patch", ratios(done, results["step35_patch", case]), 2),
                    **columns("over_half_length", ratios(done, half) if half else [], 2),
                }
            )
    return rows


def report(rows: list[dict[str, str]]) -> None:
    print(
        f"{'dtype':>8} {'heads':>5} {'S':>6} {'implementation':>15} {'total ms':>10} "
        f"{'p20..p80':>18} {'peak MiB':>8} {'x ours':>7} {'p20..p80':>14} {'x S/2':>6}"
    )
    for row in rows:
        print(
            f"{row['dtype']:>8} {row['query_heads']:>5} {row['seq_len']:>6} "
            f"{row['implementation']:>15} {row['total_ms_p50'] or row['status']:>10} "
            f"{row['total_ms_p20'] + '..' + row['total_ms_p80']:>18} {row['peak_mib']:>8} "
            f"{row['over_step35_patch_p50']:>7} "
            f"{row['over_step35_patch_p20'] + '..' + row['over_step35_patch_p80']:>14} "
            f"{row['over_half_length_p50']:>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark sliding attention; see the docstring.")
    parser.add_argument("--quick", action="store_true", help="1k and 2k, fp32, 3 rounds, no file")
    parser.add_argument("--rounds", type=int, help="default 7; 3 with --quick")
    parser.add_argument("--threads", type=int, help="of each process; default torch's choice")
    parser.add_argument("--memory-gib", type=float, default=12.0, help="limit of each process")
    parser.add_argument("--output", type=Path, help=f"CSV file to write; default {RESULTS.name}")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.worker:
        work(arguments.worker, arguments.memory_gib)
        return

    lengths = (1024, 2048) if arguments.quick else (1024, 2048, 4096, 8192, 16384)
    dtypes = ("float32",) if arguments.quick else ("float32", "bfloat16")
    cases = [(dtype, 6, s) for dtype in dtypes for s in lengths]
    if not arguments.quick:
        cases += [(dtype, 1, 16384) for dtype in dtypes]
    about = environment()
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    rows = table(cases, run(cases, rounds, arguments.memory_gib))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    report(rows)
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(about | row for row in rows)


if __name__ == "__main__":
    main()
