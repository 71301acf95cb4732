"""`step35-patch inspect`: a config's layers and totals, and whether a folder's weights are its."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_patch.commands.config_argument import add_config_argument, read_config
from step35_patch.commands.screen import is_terminal
from step35_patch.config.errors import ranges
from step35_patch.config.layer_plan import FULL_ATTENTION, SLIDING_ATTENTION, LayerPlan
from step35_patch.tensors.published import layer_tensors, published_tensors

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

_COLUMNS = (
    "layer",
    "attention",
    "heads",
    "groups",
    "head dim",
    "window",
    "rope base",
    "rotary",
    "scaled",
    "FFN",
    "limit",
    "shared limit",
    "parameters",
)


# On a terminal, what all layers have alike is said above the table.
_SAID_ABOVE = ("groups", "head dim")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Weights:
    """How the safetensors of a folder go with its config.

    Attributes:
        files: How many there are.
        problems: What does not fit, each in a line.
        notices: What the user should know, each in a line.
    """

    files: int
    problems: Sequence[str]
    notices: Sequence[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch inspect`."""
    add_config_argument(parser)
    parser.add_argument(
        "--all", action="store_true", help="a row for each layer, and every problem of the weights"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw the layers too, as .png or .svg (needs matplotlib: step35-patch[plot])",
    )
    parser.add_argument(
        "--pipeline-layout",
        metavar="LAYOUT",
        help="of --pipeline-model-parallel-layout, such as 'Ett|(tt|)*21t|mmmL': draw its stages",
    )
    parser.add_argument(
        "--pp",
        metavar="N",
        type=int,
        help="pipeline-parallel size of the layout (default: as many as it has stages)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report, and draw it.

    Returns:
        The exit status: 0; 1 if a folder's weights are not those of its config; 2 for an unusable
        config, and for a plot that cannot be drawn.
    """
    config = read_config(options)
    if config is None:
        return 2
    if problem := _draw(options, config):
        print(problem, file=sys.stderr)
        return 2
    weights = weights_of(Path(options.config), config)
    if options.json:
        print(as_json(config, weights))
    elif is_terminal():
        _show(config, weights, unfolded=options.all)
    else:
        print(as_text(config, weights, unfolded=options.all))
    return 1 if weights is not None and weights.problems else 0


def _draw(options: argparse.Namespace, config: Step35Config) -> str | None:
    """Draw what is asked for; returns why not, if it can't be drawn."""
    if options.plot is None:
        if options.pipeline_layout is None and options.pp is None:
            return None
        return "--pipeline-layout, --pp: expected --plot FILE with them, found none"
    from step35_patch.commands.layer_map import PlotError, draw

    try:
        draw(config, options.plot, layout=options.pipeline_layout, pipeline=options.pp)
    except PlotError as error:
        return str(error)
    return None


def weights_of(path: Path, config: Step35Config) -> Weights | None:
    """Hold the safetensors of a folder against a config; only their headers are read.

    Returns:
        None for what is no folder, or has no safetensors.
    """
    if not path.is_dir() or not any(path.glob("*.safetensors*")):
        return None
    from step35_patch.storage.errors import CheckpointError
    from step35_patch.storage.hf_folder import HfFolder

    files = len(list(path.glob("*.safetensors")))
    try:
        folder = HfFolder(path, config)
    except CheckpointError as error:
        return Weights(files, error.problems, ())
    return Weights(files, (), folder.notices)


def as_json(config: Step35Config, weights: Weights | None = None) -> str:
    """Everything as one JSON object: totals, layers, tensors, weights, and the config itself.

    A layer has the fields of its `LayerPlan` (the reference's window), and the number and the
    bytes of its parameters in the published checkpoint.
    """
    layers = []
    for plan in config.layers:
        tensors = tuple(layer_tensors(config, plan))
        layers.append(
            asdict(plan)
            | {
                "parameters": sum(tensor.num_elements for tensor in tensors),
                "bytes": sum(tensor.num_bytes for tensor in tensors),
            }
        )
    report = {
        "fingerprint": config.fingerprint,
        "totals": totals(config),
        "layers": layers,
        "tensors": [asdict(tensor) for tensor in published_tensors(config)],
        "weights": None if weights is None else asdict(weights),
        "config": config.to_dict(),
    }
    return json.dumps(report, indent=1)


def totals(config: Step35Config) -> dict[str, Any]:
    """Exact counts: layers by kind, and the published checkpoint's tensors, parameters, bytes."""
    tensors, decoder = published_tensors(config), [p for p in config.layers if not p.is_mtp]
    types = Counter(plan.attention_type for plan in decoder)
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.num_elements
    return {
        "decoder_layers": len(decoder),
        "full_attention_layers": types[FULL_ATTENTION],
        "sliding_attention_layers": types[SLIDING_ATTENTION],
        "moe_layers": sum(plan.is_moe for plan in decoder),
        "mtp_layers": len(config.layers) - len(decoder),
        "tensors": len(tensors),
        "parameters": sum(by_dtype.values()),
        "parameters_by_dtype": dict(by_dtype),
        "bytes": sum(tensor.num_bytes for tensor in tensors),
    }


def as_text(config: Step35Config, weights: Weights | None = None, *, unfolded: bool = False) -> str:
    """A table with one row a layer, or for equal neighbours, and the totals below it."""
    rows = [_COLUMNS, *_rows(config, unfolded)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    below = [*_totals_text(config), *_weights_text(weights, unfolded)]
    return "\n".join([*_head(config), "", *table, "", *below])


def _show(config: Step35Config, weights: Weights | None, *, unfolded: bool) -> None:
    """The same for a terminal of any width."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    columns = dict(zip(_COLUMNS, zip(*_rows(config, unfolded), strict=True), strict=True))
    alike = [name for name in _SAID_ABOVE if len(set(columns[name])) == 1]
    for line in _head(config):
        console.print(line)
    if alike:
        console.print("all layers: " + ", ".join(f"{name} {columns[name][0]}" for name in alike))
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    shown = [name for name in _COLUMNS if name not in alike]
    for name in shown:
        # All fits into 80 columns if "MTP, dense" takes two lines, and headings do.
        table.add_column("\n".join(name.split()), justify="right", no_wrap=name != "FFN")
    for row in zip(*(columns[name] for name in shown), strict=True):
        kind = row[shown.index("attention")]
        table.add_row(*row, style="bold cyan" if kind == "full" else "")
    console.print("", table, "", sep="\n")
    for line in [*_totals_text(config), *_weights_text(weights, unfolded)]:
        console.print(line)


def _weights_text(weights: Weights | None, unfolded: bool) -> Iterator[str]:
    if weights is None:
        return
    number = len(weights.problems)
    found = f"{number} problem{'s' * (number != 1)}" if number else "as the config expects"
    yield f"weights     {weights.files} files: {found}"
    shown = number if unfolded else _SHOWN_PROBLEMS
    yield from (f"  {line}" for line in [*weights.problems[:shown], *weights.notices])
    if number > shown:
        yield f"  and {number - shown} more; --all lists them"


def _head(config: Step35Config) -> list[str]:
    gate = "head-wise gate" if config.use_head_wise_attn_gate else "no attention gate"
    lines = [
        f"hidden size {config.hidden_size}, dense FFN {config.intermediate_size},"
        f" vocabulary {config.vocab_size}, {gate}, norm eps {config.rms_norm_eps:g},"
        f" {config.torch_dtype}"
    ]
    if any(plan.is_moe for plan in config.layers):
        lines.append(
            f"MoE: top {config.moe_top_k} of {config.moe_num_experts} experts of"
            f" {config.moe_intermediate_size}, shared expert {config.share_expert_dim},"
            f" router scaling {config.moe_router_scaling_factor:g}"
        )
    scaling = next((p.rope_scaling for p in config.layers if p.rope_scaling), None)
    if scaling:
        lines.append(
            f"RoPE scaling: {scaling.rope_type}, factor {scaling.factor:g}, low"
            f" {scaling.low_freq_factor:g}, high {scaling.high_freq_factor:g}, original"
            f" {scaling.original_max_position_embeddings} tokens"
        )
    return lines


def _rows(config: Step35Config, unfolded: bool) -> Iterator[tuple[str, ...]]:
    """A row for neighbours that are alike, or for each layer."""
    for _, group in groupby(config.layers, lambda p: p if unfolded else replace(p, index=0)):
        plans = list(group)
        yield (ranges(plan.index for plan in plans), *_cells(config, plans[0]))


def _cells(config: Step35Config, plan: LayerPlan) -> tuple[str, ...]:
    return (
        plan.attention_type.removesuffix("_attention"),
        f"{plan.num_attention_heads}",
        f"{plan.num_query_groups}",
        f"{plan.kv_channels}",
        "-" if plan.window_size is None else f"{plan.window_size[0] + 1}",
        _number(plan.rotary_base),
        _number(plan.rotary_percent),
        plan.rope_scaling.rope_type if plan.rope_scaling else "-",
        ("MTP, " if plan.is_mtp else "") + ("MoE" if plan.is_moe else "dense"),
        _number(plan.swiglu_limit),
        _number(plan.swiglu_limit_shared),
        f"{sum(tensor.num_elements for tensor in layer_tensors(config, plan))}",
    )


def _number(value: float | None) -> str:
    """A number in full, without the ".0" of a whole one."""
    return "-" if value is None else repr(value).removesuffix(".0")


def _totals_text(config: Step35Config) -> list[str]:
    count = totals(config)
    by_dtype = ", ".join(f"{dtype} {n}" for dtype, n in count["parameters_by_dtype"].items())
    return [
        "Window: keys that a query sees, itself included. Limits: after the activation, routed"
        " experts; shared expert and dense FFN. Parameters: of one layer.",
        f"decoder     {count['decoder_layers']} layers: {count['full_attention_layers']} full,"
        f" {count['sliding_attention_layers']} sliding; {count['moe_layers']} MoE",
        f"MTP         {count['mtp_layers']} layers",
        f"tensors     {count['tensors']}",
        f"parameters  {count['parameters']} ({by_dtype})",
        f"bytes       {count['bytes']} ({count['bytes'] / 1e9:.2f} GB)",
    ]
