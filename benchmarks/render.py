"""Writes the tables of README.md from the result files, and the plots beside those.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and is made of results/NAME.csv:
in the form that `TABLES` has for it, or else, for what `paired.py` has written, with a row for each
case. Below it stands when, where and with which versions it was measured. Numbers of a result file
stand in these tables only, so that the two can't drift; tests/package/test_benchmarks.py fails if
README.md is not what this would write.

    python benchmarks/render.py            # writes README.md and results/*.png
    python benchmarks/render.py --check    # says whether README.md is up to date; writes nothing
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
RESULTS = HERE / "results"

Row = dict[str, str]
# The columns of `paired.about`, and how they are named below a table.
ABOUT = {
    "step35_patch": "step35_patch",
    "megatron_core": "Megatron-Core",
    "transformers": "transformers",
    "torch": "torch",
}
WHERE = ("date", "device", "threads", "clock", *ABOUT)
MARKERS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rendered(text: str) -> str:
    """The README with each table as the result files have it.

    Raises:
        FileNotFoundError: a table's result file is missing.
    """

    def table(match: re.Match[str]) -> str:
        rows = read(match[2])
        lines = TABLES.get(match[2], compared)(rows)
        return f"{match[1]}\n" + "\n".join([*lines, "", where(rows), "", match[3]])

    return MARKERS.sub(table, text)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, its columns of numbers aligned to the right."""
    number = re.compile(r"([\d.-]+(e-\d+)?( .*)?|out of memory|)$")
    right = [all(number.match(row[i]) for row in rows) for i in range(len(headings))]
    lines = [headings, ["---:" if yes else "---" for yes in right], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def where(rows: Sequence[Row]) -> str:
    """When, where and with what; several values of one column are all named."""

    def values(column: str) -> str:
        return " and ".join(sorted({row[column] for row in rows if row.get(column)}))

    parts = [value for column in ("date", "device") if (value := values(column))]
    if threads := values("threads"):  # counts are of none
        parts.append(plural(threads, "thread"))
    if clock := values("clock"):
        parts.append(f"{clock} time")
    if rounds := max(int(row.get("rounds", 0)) for row in rows):
        parts.append(plural(str(rounds), "round"))
    parts += [f"{name} {values(column)}" for column, name in ABOUT.items() if values(column)]
    return f"*{'; '.join(parts)}.*"


def plural(count: str, what: str) -> str:
    return f"{count} {what}" + "s" * (count != "1")


# --- What paired.py has written -------------------------------------------------------------------


def cases(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case, an implementation each."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    return [list(rows[i : i + len(names)]) for i in range(0, len(rows), len(names))]


def compared(rows: Sequence[Row]) -> list[str]:
    """A line for each case: the first implementation's time, and the others' over it.

    Columns of the case that are the same in all lines are left out, for the text to say.
    """
    columns = list(rows[0])
    first = columns.index("implementation")
    described = [
        name
        for name in columns[:first]
        if name not in WHERE and len({row[name] for row in rows}) > 1
    ]
    times = next(i for i, name in enumerate(columns) if name.endswith("_ms_p20"))
    counts = [
        name
        for name in columns[times:]
        if not re.search(r"_p\d\d$", name) and not name.endswith("_over_previous")
    ]
    groups = cases(rows)
    base, *others = [row["implementation"] for row in groups[0]]
    grows = "over_previous_p50" in columns
    headings = [*(name.replace("_", " ") for name in described), f"`{base}`"]
    previous = "over the previous size"
    headings += [previous] * grows
    headings += [f"`{name}` / `{base}`" for name in others]
    alone = grows and not others
    for name in counts:
        headings += [unit(name), *[previous] * alone]
    lines = []
    for ours, *theirs in groups:
        line = [*(ours[name] for name in described), milliseconds(ours)]
        if grows:
            line.append(spread(ours, "over_previous"))
        line += [spread(row, f"over_{base}") for row in theirs]
        for name in counts:
            line.append(", ".join(row[name] or "-" for row in (ours, *theirs)))
            if alone:
                line.append(ours[f"{name}_over_previous"])
        lines.append(line)
    return markdown(headings, lines)


def unit(column: str) -> str:
    """A heading for sizes and counts: `peak_mib` is "peak MiB"."""
    units = {"mib": "MiB", "gib": "GiB", "gflop": "GFLOP"}
    return " ".join(units.get(word, word) for word in column.split("_"))


def milliseconds(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    time = float(row["total_ms_p50"])
    return f"{time:.0f} ms" if time >= 100 else f"{time:.2g} ms"


def spread(row: Row, column: str) -> str:
    """The median, and in brackets the 20th and 80th percentile."""
    if row["status"] != "ok":
        return row["status"]
    low, middle, high = (row[f"{column}_{p}"] for p in ("p20", "p50", "p80"))
    if not middle:
        return ""
    digits = 2 if float(middle) < 10 else 1
    return f"{float(middle):.{digits}f} ({float(low):.{digits}f}-{float(high):.{digits}f})"


# --- What other scripts have written --------------------------------------------------------------


def context_parallel(rows: Sequence[Row]) -> list[str]:
    windows = [row for row in rows if row["window"] != "none"]
    lines = [
        [
            row["tokens"],
            row["context_parallel_size"],
            row["document"],
            "yes" if row["counted"] == "True" else "",
            f"{int(row['fetched_bytes']) / 1e6:.1f} MB",
            f"{int(row['gathered_bytes']) / 1e6:.1f} MB",
            f"{float(row['gathered_over_fetched']):.1f}",
        ]
        for row in windows
    ]
    headings = ["tokens", "ranks", "tokens of a document", "counted", "sliding layer"]
    return markdown([*headings, "gathering all", "ratio"], lines)


def convert(rows: Sequence[Row]) -> list[str]:
    def between(rows: Sequence[Row], column: str) -> str:
        values = [float(row[column]) for row in rows]
        return f"{min(values):.2f}-{max(values):.2f}"

    lines = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == direction]
        columns = ("cp_gb_s", "convert_gb_s", "rate_over_cp", "memory_above_start_gib")
        size = f"{int(own[0]['bytes']) / 1e9:.1f}"
        lines.append([direction, size, *(between(own, column) for column in columns)])
    headings = ["direction", "GB", "`cp`, GB/s", "convert, GB/s", "convert's rate / `cp`'s"]
    return markdown([*headings, "memory above the start, GiB"], lines)


def count(rows: Sequence[Row]) -> list[str]:
    """Kernels, bytes and operations of the shorter sequence; shares of both."""
    short, long = sorted({int(row["tokens"]) for row in rows})
    shares = {
        (row["layer"], row["implementation"]): f"{100 * float(row['predicted_share']):.1f} %"
        for row in rows
        if int(row["tokens"]) == long
    }
    lines = [
        [
            row["layer"],
            row["implementation"],
            *(f"{row[f'{way}_kernels']}" for way in ("forward", "backward")),
            *(f"{int(row[f'{way}_bytes']) / 1e9:.2f}" for way in ("forward", "backward")),
            f"{int(row['gemm_flops']) / 1e12:.2f}",
            f"{int(row['kept_bytes']) / 1e9:.2f}",
            f"{float(row['predicted_ms']):.1f} ms",
            f"{100 * float(row['predicted_share']):.1f} %",
            shares[row["layer"], row["implementation"]],
        ]
        for row in rows
        if int(row["tokens"]) == short
    ]
    for line in lines:
        if line[1] == "floor":  # which has no kernels, and keeps what it likes
            line[2] = line[3] = line[7] = ""
    headings = ["layer", "", "kernels forward", "backward", "GB forward", "backward"]
    headings += ["products, TFLOP", "kept, GB", "predicted", "share of the rest", f"at {long}"]
    return markdown(headings, lines)


def training_curve(rows: Sequence[Row]) -> list[str]:
    first, last = rows[0], rows[-1]
    worst = max(float(row["largest_relative_difference"]) for row in rows)
    line = [last["iteration"], first["loss"], last["loss"], last["reference_loss"], f"{worst:.1e}"]
    headings = ["iterations", "first loss", "last loss", "transformers'"]
    return markdown([*headings, "largest relative difference of any loss"], [line])


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "context_parallel": context_parallel,
    "convert": convert,
    "count": count,
    "training_curve": training_curve,
    "training_curve_authors": training_curve,
}


# --- Plots ----------------------------------------------------------------------------------------

# For each result file the columns that time is shown over, a panel each.
PLOTS = {
    "sliding_attention": ("seq_len",),
    "growth": ("seq_len", "layers", "experts"),
}


def plot(name: str, over: Sequence[str]) -> None:
    """results/NAME.png: medians with their spread, a line for each implementation.

    A panel has the cases that differ in its column alone from the first one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(name)
    columns = [c for c in list(rows[0])[: list(rows[0]).index("implementation")] if c not in WHERE]
    figure, panels = pyplot.subplots(
        1, len(over), figsize=(3 + 3.5 * len(over), 4.5), sharey=True, squeeze=False
    )
    for axes, x in zip(panels[0], over, strict=True):
        fixed = [column for column in columns if column != x]
        shown = [row for row in rows if all(row[c] == rows[0][c] for c in fixed)]
        for implementation in dict.fromkeys(row["implementation"] for row in shown):
            own = [
                row
                for row in shown
                if row["implementation"] == implementation and row["status"] == "ok"
            ]
            at = [int(row[x]) for row in own]
            low, middle, high = (
                [float(row[f"total_ms_{p}"]) for row in own] for p in ("p20", "p50", "p80")
            )
            (line,) = axes.loglog(at, middle, marker="o", label=implementation)
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
        ticks = sorted({int(row[x]) for row in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.tick_params("x", which="minor", bottom=False, labelbottom=False)
        axes.set_xlabel(x.replace("_", " "))
    panels[0][0].set_ylabel("forward and backward, ms")
    panels[0][0].legend()
    figure.suptitle(
        f"{name.replace('_', ' ')}: "
        + ", ".join(f"{c.replace('_', ' ')} {rows[0][c]}" for c in columns if c not in over),
        fontsize=9,
    )
    figure.text(0.5, 0.005, where(rows).strip("*"), ha="center", fontsize=5)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write README.md's tables; see the docstring.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if outdated")
    options = parser.parse_args(arguments)
    text = README.read_text()
    wanted = rendered(text)
    if options.check:
        if wanted != text:
            print("benchmarks/README.md is not what results/ says: run benchmarks/render.py")
        return int(wanted != text)
    README.write_text(wanted)
    for name, over in PLOTS.items():
        plot(name, over)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
