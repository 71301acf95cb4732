"""`step35-patch inspect`: a config's layers and exact totals, as text or as JSON."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from step35_patch.commands.config_argument import add_config_argument, read_config
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
    "rotated",
    "scaling",
    "FFN",
    "limit",
    "shared limit",
    "parameters",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch inspect`."""
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; returns the exit status: 0, or 1 for an unusable config."""
    config = read_config(options)
    if config is None:
        return 1
    print(as_json(config) if options.json else as_text(config))
    return 0


def as_json(config: Step35Config) -> str:
    """Everything as one JSON object: totals, layers, tensors, and the config itself.

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


def as_text(config: Step35Config) -> str:
    """A table with one row a layer, and the totals below it."""
    rows = [_COLUMNS, *(_row(config, plan) for plan in config.layers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return "\n".join([*_head(config), "", *table, "", *_totals_text(config)])


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


def _row(config: Step35Config, plan: LayerPlan) -> tuple[str, ...]:
    return (
        f"{plan.index}",
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
        " experts; shared expert and dense FFN.",
        f"decoder     {count['decoder_layers']} layers: {count['full_attention_layers']} full,"
        f" {count['sliding_attention_layers']} sliding; {count['moe_layers']} MoE",
        f"MTP         {count['mtp_layers']} layers",
        f"tensors     {count['tensors']}",
        f"parameters  {count['parameters']} ({by_dtype})",
        f"bytes       {count['bytes']} ({count['bytes'] / 1e9:.2f} GB)",
    ]
