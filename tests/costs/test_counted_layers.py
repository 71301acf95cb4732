"""What a layer costs on a GPU besides products and attention, held against Megatron-Core's own.

`benchmarks/count.py` counts kernels, bytes and what is kept for backward; the counts of small
layers are the same on every machine. Ours may cost more than a stock layer by its gate alone, and
its clamps nothing.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import counting

    return counting


def _counted(counting, run):
    """(kernels, bytes read, bytes written) of a forward pass."""
    counter = counting.Counter()
    with counter.counting("forward"):
        run()
    totals = counter.totals.get("forward", counting.Totals())
    return totals.kernels, totals.read, totals.written


def test_the_rules_of_counting(counting):
    x, row, index = torch.rand(4, 6), torch.rand(1, 6), torch.tensor([0, 2])
    wide, two = row.expand(4, 6), torch.rand(2, 6)
    expected = {
        "views": (lambda: x.view(2, 12)[1:].t().detach(), (0, 0, 0)),
        "empty memory": (lambda: torch.empty_like(x), (0, 0, 0)),
        "a copy": (lambda: x.t().contiguous(), (1, 96, 96)),
        "the same read twice": (lambda: x * x, (1, 96, 96)),
        "an expanded row is read once": (lambda: x + wide, (1, 96 + 24, 96)),
        "zeros read nothing": (lambda: torch.zeros_like(x), (1, 0, 96)),
        "overwriting does not read": (lambda: x.copy_(wide), (1, 24, 96)),
        "adding in place reads": (lambda: x.add_(row), (1, 96 + 24, 96)),
        "chosen rows": (lambda: x.index_select(0, index), (1, 48 + 16, 48)),
        "rows added": (lambda: x.index_add_(0, index, two), (1, 48 + 16 + 48, 48)),
        "a product": (lambda: x @ x.T, (0, 0, 0)),
    }
    found = {name: _counted(counting, run) for name, (run, _) in expected.items()}
    assert found == {name: wanted for name, (_, wanted) in expected.items()}


def test_what_is_kept_for_backward(counting):
    x, weight = torch.rand(4, 6, requires_grad=True), torch.rand(6, requires_grad=True)
    counter = counting.Counter()
    with counter.counting("forward"), counter.keeping():
        dropped = (x * weight).sin()
        out = (x * weight).exp()
    del dropped
    kept = counter.kept(but=[x, weight])
    assert [torch.equal(x, out) for x in kept.values()] == [True]


@pytest.mark.transformer_engine(only=True)
def test_a_layer_costs_its_gate_more_than_a_stock_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from count import SHAPES, SMALL
    from layers import SLIDING

    results = tmp_path / "count.csv"
    subprocess.run(
        [sys.executable, BENCHMARKS / "count.py", "--quick", "--output", results],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with results.open() as file:
        rows = {(row["layer"], row["implementation"]): row for row in csv.DictReader(file)}
    for shape in SHAPES:
        ours = rows[shape.name, "ours"]
        stock = rows[shape.name.removesuffix(" clamped"), "stock"]
        tokens = int(ours["tokens"])
        number = SMALL.sliding_heads if shape.attention == SLIDING else SMALL.heads
        logits = 2 * tokens * number  # bf16
        heads = logits * SMALL.channels

        def more(name, ours=ours, stock=stock):
            return int(ours[name]) - int(stock[name])

        # The gate forward and backward, and a copy of its logits out of QKV.
        assert more("forward_kernels") + more("backward_kernels") == 3, shape
        # Attention's output and logits in, gated out; and that copy, read and written.
        assert more("forward_bytes") == 2 * heads + logits + 2 * logits, shape
        # Both and the gradient in, two gradients out; and that of the logits on its way into QKV's.
        assert more("backward_bytes") == 3 * heads + 2 * logits + 2 * logits, shape
        assert more("kept_tensors") == 2, shape
        assert more("kept_bytes") == heads + logits, shape
        floor = rows[shape.name, "floor"]
        for name in ("forward_bytes", "backward_bytes"):
            assert int(floor[name]) < int(stock[name]) + more(name), shape
