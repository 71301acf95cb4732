"""Training, ours against transformers' Step3p7: with AdamW, and as the authors fine-tune.

    python benchmarks/training_curve.py [adam] [authors]
    python benchmarks/training_curve.py --quick    # 5 iterations of each; writes no file

Runs `train_ours` and `train_reference` of tests/support/training_curve.py, which describes them:
200 iterations with torch's AdamW as the reference's optimizer, 100 of packed documents with an
independent Muon. Writes results/training_curve*.csv and .png: both losses, those of the MTP layers,
and the largest relative difference of any of them, by iteration.

It covers a tiny model with every feature of Step-3.5 in fp32 on the CPU, Megatron-Core's optimizer,
clipping and MTP losses. It says nothing about speed, about other precisions, or about the size at
which the published model is trained. tests/training/test_training_curve.py holds them to 1e-3.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import paired
import torch

TITLE = "A tiny Step-3.5, trained by Megatron-Core and by transformers + torch "


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and compare; see the docstring.")
    parser.add_argument("names", nargs="*", metavar="RUN", help="adam, authors; default both")
    parser.add_argument("--quick", action="store_true", help="5 iterations of each; no file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        from step35_patch import cpu

        cpu.install()
    torch.set_num_threads(1)  # matrices this small are not worth sharing

    from support.training_curve import (
        ADAM,
        AUTHORS,
        differences,
        train_ours,
        train_reference,
        write_folder,
    )

    runs = {
        "adam": (ADAM, 200, "training_curve", "AdamW"),
        "authors": (AUTHORS, 100, "training_curve_authors", "Muon, packed documents"),
    }
    about = paired.about("megatron-core", "transformers")
    for name in options.names or runs:
        recipe, steps, file, optimizer = runs[name]
        steps = 5 if options.quick else steps
        with tempfile.TemporaryDirectory() as folder:
            hf_folder, config, weights = write_folder(Path(folder, "hf"))
            _, ours = train_ours(recipe, hf_folder, steps)
            theirs = train_reference(recipe, config, weights, steps)
        apart = differences(ours, theirs)
        if not options.quick:
            rows = [about | row for row in _rows(ours, theirs, apart)]
            paired.write(paired.RESULTS / f"{file}.csv", rows)
            path = paired.RESULTS / f"{file}.png"
            _plot(path, TITLE + optimizer, about, ours, theirs, apart)
        print(
            f"{name}: loss {ours[0].loss:.3f} -> {ours[-1].loss:.3f}, largest difference "
            f"{max(apart):.2g}"
        )


def _rows(ours, theirs, apart) -> Iterator[paired.Row]:
    for step, (a, b, difference) in enumerate(zip(ours, theirs, apart, strict=True), start=1):
        mtp = {}
        for depth, losses in enumerate(zip(a.mtp_losses, b.mtp_losses, strict=True), start=1):
            for whose, loss in zip(("", "reference_"), losses, strict=True):
                mtp[f"{whose}mtp_{depth}_loss"] = f"{loss:.6f}"
        yield {
            "iteration": step,
            "loss": f"{a.loss:.6f}",
            "reference_loss": f"{b.loss:.6f}",
            **mtp,
            "largest_relative_difference": f"{difference:.3g}",
        }


def _plot(path: Path, title: str, about: paired.Row, ours, theirs, apart) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, relative) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 7), height_ratios=[2, 1]
    )
    steps = range(1, len(ours) + 1)
    lines = [("loss", [s.loss for s in ours], [s.loss for s in theirs])]
    for depth in range(len(ours[0].mtp_losses)):
        lines.append(
            (
                f"MTP layer {depth + 1}",
                [s.mtp_losses[depth] for s in ours],
                [s.mtp_losses[depth] for s in theirs],
            )
        )
    for colour, (name, found, wanted) in enumerate(lines):
        losses.plot(steps, wanted, color=f"C{colour}", lw=4, alpha=0.35, label=f"{name}, reference")
        losses.plot(steps, found, color=f"C{colour}", lw=1, label=f"{name}, step35_patch")
    losses.set_ylabel("cross entropy (nats a token)")
    losses.set_title(title)
    losses.legend(ncols=len(lines), fontsize=8)
    relative.semilogy(steps, apart, color="C3", lw=1)
    relative.axhline(1e-3, color="grey", ls="--", lw=1, label="held by the test")
    relative.set_ylabel("largest relative difference")
    relative.set_xlabel("iteration")
    relative.legend(fontsize=8)
    versions = ", ".join(f"{name} {value}" for name, value in about.items())
    figure.text(0.5, 0.005, versions, ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
