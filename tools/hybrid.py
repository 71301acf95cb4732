"""How far Step-3.5 as a HybridModel is from the reference and from GPTModel: docs/hybrid.md.

    python tools/hybrid.py            # all of it, with the Megatron-Core that is imported
    python tools/hybrid.py PART ...   # reference, layouts, checkpoints

By hand, on either implementation as the tests are (STEP35_TEST_IMPLEMENTATION). The figures go to
benchmarks/results/hybrid.csv, where they replace those of the same part, implementation and
Megatron-Core.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TABLE = ROOT / "benchmarks" / "results" / "hybrid.csv"
KEY = ("part", "implementation", "megatron_core")
COLUMNS = (
    *("date", "step35_patch", "megatron_core", "torch", "device", "implementation", "part"),
    *("case", "processes", "outcome", "logits", "loss", "gradient", "gradient_tensor"),
    *("change", "log", "norm", "as_gpt_model", "seconds"),
)
# Code that has the ranks build HybridModels; with a checkpoint's, one after a GPTModel, or before.
HYBRID = "from support import gradient_worker, hybrid; gradient_worker.chunks_of = hybrid.chunks_of"
TAKEN_OVER = """
from support import distributed_worker, gradient_worker, hybrid, resume_worker
both = [distributed_worker.chunks_of, hybrid.chunks_of]
made = iter(both if arguments[4] == "to HybridModel" else both[::-1])
gradient_worker.chunks_of = lambda provider: next(made)(provider)
resume_worker.main(*arguments[:4], arguments[3])
"""
CONVERTED = """
from support import convert_worker, distributed_worker, hybrid
distributed_worker.chunks_of = hybrid.chunks_of
convert_worker.main(*arguments)
"""
RESHARDABLE = {"distrib_optim_sharding_type": "dp_reshardable"}  # the default
FULLY_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
Rows = Iterator[dict[str, Any]]


def main() -> None:
    from support import implementation

    implementation.install()
    parts: dict[str, Callable[[Path], Rows]] = {
        "reference": reference,
        "layouts": layouts,
        "checkpoints": checkpoints,
    }
    parser = argparse.ArgumentParser(description="Measure.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    asked = parser.parse_args().parts or list(parts)
    import megatron.core
    import torch

    import step35_patch

    about = {
        "date": str(datetime.date.today()),
        "step35_patch": step35_patch.__version__,
        "megatron_core": megatron.core.__version__.partition("+")[0],
        "torch": torch.__version__,
        "device": f"CPU ({platform.machine()})",
        "implementation": implementation.IMPLEMENTATION,
    }
    for part in asked:
        found, began = [], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for row in parts[part](Path(folder)):
                seconds, began = time.monotonic() - began, time.monotonic()
                found.append(about | {"part": part, "seconds": f"{seconds:.1f}"} | row)
                print(found[-1], flush=True)
        write(found)


def write(found: list[dict[str, Any]]) -> None:
    """Put a part's figures in the place of its old ones."""
    old: list[dict[str, Any]] = []
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            old = list(csv.DictReader(file))
    new = {tuple(row[name] for name in KEY) for row in found}
    rows = [row for row in old if tuple(row[name] for name in KEY) not in new] + found
    rows.sort(key=lambda row: tuple(row[name] for name in KEY))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def reference(folder: Path) -> Rows:
    """One process: against transformers' Step3p7, and bit for bit against the GPTModel."""
    from support.parity import FEATURES
    from support.reference import WINDOW, tiny_config

    for gate_layout in ("headwise", "expanded"):
        for name, changes in FEATURES.items():
            config = tiny_config(**changes)
            yield against_reference(
                folder, f"{name}, {gate_layout}", config, 1, 3 * WINDOW + 1, gate_layout
            )
    for length in (WINDOW - 3, WINDOW, WINDOW + 1, 12 * WINDOW + 5):
        for seed in (2, 3, 4):
            case = f"everything, length {length}, seed {seed}"
            yield against_reference(folder, case, tiny_config(), seed, length, "headwise")


def against_reference(
    folder: Path, case: str, config: dict[str, Any], seed: int, length: int, gate_layout: str
) -> dict[str, Any]:
    """One config, seed and length."""
    import torch
    from support import hybrid, ours
    from support.parity import relative, total_loss
    from support.reference import Reference, random_tokens, random_weights, write_hf_folder

    weights = random_weights(config, seed)
    hf_dir = write_hf_folder(folder / re.sub(r"\W+", "-", case), config, weights)
    tokens, labels = random_tokens(seed, 2, length)
    expected = Reference(config, weights)
    logits, loss, mtp_losses = expected.losses(tokens, labels)
    found = []
    for build in (hybrid.build, ours.build):
        model = build(hf_dir, gate_layout=gate_layout)
        model.train()
        losses = ours.run(model, tokens, labels)
        losses.mean().backward()
        own = ours.published_gradients(model)
        found.append({"logits": ours.run(model, tokens), "losses": losses, **own})
    total_loss(model, loss, mtp_losses).backward()
    mine, gpt = found
    gradients = expected.gradients()
    floor = 1e-6 * max(gradient.abs().max().item() for gradient in gradients.values())
    # Where the reference's gradient is zero (q and k of a one-key window), ours is rounding.
    off = {
        name: relative(mine[name], gradient)
        for name, gradient in gradients.items()
        if gradient.any() or mine[name].abs().max() > floor
    }
    worst = max(off, key=off.__getitem__)
    same = mine.keys() == gpt.keys() and all(torch.equal(mine[n], gpt[n]) for n in gpt)
    return {
        "case": case,
        "processes": 1,
        "outcome": "compared",
        "logits": f"{relative(mine['logits'], logits):.2g}",
        "loss": f"{abs(mine['losses'].mean().item() / loss.item() - 1):.2g}",
        "gradient": f"{off[worst]:.2g}",
        "gradient_tensor": worst,
        "as_gpt_model": "equal" if same else "differs",
    }


def layouts(folder: Path) -> Rows:
    """The cases of tests/support/gradient_cases.py, each against a GPTModel in one process."""
    from support.gradient_cases import CASES, ENGINE_CASES, Refused, hold, write_start
    from support.implementation import ON_TRANSFORMER_ENGINE
    from support.ranks import worker_ranks

    shared = made_once(folder)
    start, ranks = shared("start", write_start), worker_ranks(shared("ranks", lambda _: None))
    try:
        cases = ENGINE_CASES if ON_TRANSFORMER_ENGINE else CASES
        for number, (name, case) in enumerate(cases.items()):
            if name.startswith("MTP layers") or case.refusal:
                continue  # a HybridModel has its MTP layers on the last stage
            out = shared(f"case-{number}", lambda _: None)
            found = hold(case, start, HybridRanks(ranks), out, shared)
            assert not isinstance(found, Refused), name
            assert not found.missing, found
            yield {
                "case": name,
                "processes": case.processes,
                "outcome": "compared",
                "gradient": f"{found.gradient.difference:.2g}",
                "gradient_tensor": found.gradient.name,
                "change": f"{found.change.difference:.2g}",
                "log": f"{found.log.difference:.2g}",
                "norm": f"{found.norm:.2g}",
            }
    finally:
        ranks.close()


class HybridRanks:
    """Ranks that build HybridModels, but for the run that others are held against."""

    def __init__(self, ranks: Any):
        self.ranks = ranks

    def run(self, code: str, processes: int, *arguments: object) -> Any:
        is_compared = bool(str(arguments[1]))
        return self.ranks.run(f"{HYBRID}\n{code}" if is_compared else code, processes, *arguments)


def checkpoints(folder: Path) -> Rows:
    """Training goes on in the other kind of model, and converted weights are a HybridModel's."""
    import torch
    from support import ours
    from support.gradient_cases import Case, write_start
    from support.implementation import ON_TRANSFORMER_ENGINE
    from support.ranks import worker_ranks
    from support.reference import WINDOW, random_tokens

    from step35_patch.convert import convert_to_megatron

    shared = made_once(folder)
    start, ranks = shared("start", write_start), worker_ranks(shared("ranks", lambda _: None))
    cases = {name: (Case(name), {}) for name in ("pipeline", "tp2 with sequence parallelism")}
    if ON_TRANSFORMER_ENGINE:  # torch's Adam can't be asked for its state before its first step
        sharded = Case("expert parallel", distributed_optimizer=True)
        cases |= {
            "expert parallel: distributed optimizer": (sharded, RESHARDABLE),
            "expert parallel: distributed optimizer, fully reshardable": (
                sharded,
                FULLY_RESHARDABLE,
            ),
        }
    try:
        for direction in ("to HybridModel", "to GPTModel"):
            for number, (name, (case, sharding)) in enumerate(cases.items()):
                out = shared(f"{direction}-{number}", lambda _: None)
                spec = json.dumps(case.spec() | {"sharding": sharding})
                ended = ranks.run(TAKEN_OVER, case.processes, start, out, spec, "{}", direction)
                assert not any(ended.statuses), ended.text[-4000:]
                found = [json.loads(file.read_text()) for file in out.glob("*.json")]
                assert len(found) == case.processes
                worst = max(found, key=lambda rank: max(rank["gradients"].values()))["gradients"]
                yield {
                    "case": f"{name}, {direction}",
                    "processes": case.processes,
                    "outcome": "compared",
                    "gradient": f"{max(worst.values()):.2g}",
                    "gradient_tensor": max(worst, key=worst.__getitem__),
                    "change": f"{max(max(rank['changes'].values()) for rank in found):.2g}",
                    "log": f"{max(map(log_difference, found)):.2g}",
                }
        converted = folder / "converted"
        convert_to_megatron(start, converted)
        model = ours.build(start)
        with torch.no_grad():
            torch.save(ours.run(model, random_tokens(1, 2, 3 * WINDOW)[0]), folder / "logits.pt")
        for name in ("one process", "virtual pipeline", "tp2, ep2, etp1"):
            case, out = Case(name), shared(f"converted-{name}", lambda _: None)
            arguments = (
                start,
                converted,
                folder / "logits.pt",
                out,
                json.dumps(case.spec()["layout"]),
            )
            ended = ranks.run(CONVERTED, case.processes, *arguments)
            assert not any(ended.statuses), ended.text[-4000:]
            yield {
                "case": f"converted from the published layout, {name}",
                "processes": case.processes,
                "outcome": "logits within 2e-5",
            }
    finally:
        ranks.close()


def log_difference(rank: dict[str, Any]) -> float:
    """How far what is logged is from what the other model would have logged."""
    return max(
        abs(log[name] / wanted[name] - 1)
        for log, wanted in zip(rank["logs"], rank["wanted logs"], strict=True)
        for name in wanted
        if wanted[name]
    )


def made_once(folder: Path) -> Callable[[str, Callable[[Path], Any]], Path]:
    """Gives a folder of a name, filled by a function when it is asked for first."""

    def shared(name: str, make: Callable[[Path], Any]) -> Path:
        made = folder / re.sub(r"\W+", "-", name)
        if not made.exists():
            made.mkdir()
            make(made)
        return made

    return shared


if __name__ == "__main__":
    main()
