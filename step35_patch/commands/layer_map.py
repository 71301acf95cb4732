"""The picture of `step35-patch inspect --plot`: a column for each layer, a row for each property.

Every cell says its value in figures or letters, and dark stands against light: nothing is told by
hue alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_patch.commands.upstream_notices import without_upstream_notices
from step35_patch.config.layer_plan import FULL_ATTENTION, LayerPlan
from step35_patch.tensors.published import published_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from step35_patch.config.model import Step35Config

FORMATS = (".png", ".svg")
_CELL = 0.27  # inches, wide and high
_DPI = 144
_GAP = 0.6  # of a cell, before the MTP layers
_LABELS = 7.0  # cells, for the names of the rows
# Dark, light, and between, by lightness far enough apart for grey; the hues are Okabe and Ito's.
_DARK, _MIDDLE, _LIGHT, _NONE = "#0b4a7a", "#e69f00", "#d6e9f8", "#ffffff"
_EDGE = "#8c959f"


class PlotError(ValueError):
    """The picture can't be drawn; the message is one line, with the option."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage of a layout, in the order of the layers.

    Attributes:
        rank: Its pipeline rank.
        chunk: Which of the rank's model chunks (virtual stages) it is.
        layers: Absolute indices.
        others: What else it has: the embedding, the loss.
    """

    rank: int
    chunk: int
    layers: tuple[int, ...]
    others: tuple[str, ...]


def draw(
    config: Step35Config, file: Path, *, layout: str | None = None, pipeline: int | None = None
) -> None:
    """Draw a config's layers into a file.

    Args:
        config: The model.
        file: To be written, .png or .svg.
        layout: Of `--pipeline-model-parallel-layout`, to draw its stages; None for no stages.
        pipeline: Pipeline-parallel size; as many as the layout has stages if None.

    Raises:
        PlotError: matplotlib is missing, the file can't be written, or Megatron-Core does not take
            the layout.
    """
    if file.suffix.lower() not in FORMATS:
        raise PlotError(f"--plot: expected a file named .png or .svg, found {str(file)!r}")
    if layout is None and pipeline is not None:
        raise PlotError("--pp: expected --pipeline-layout with it, found none")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            f"--plot: expected matplotlib, found none ({error}); pip install 'step35-patch[plot]'"
        ) from None
    stages = [] if layout is None else stages_of(config, layout, pipeline)
    rows = len(_ROWS) + (2 if stages else 0)
    columns = len(config.layers) + _GAP + _LABELS
    size = (max(columns, 46) * _CELL + 0.3, (rows + 6.9 - (not stages)) * _CELL)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "step35-patch", "font.size": 8}):
        figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-_LABELS, size[0] / _CELL - _LABELS)
        axes.set_ylim(rows + 4.3 - (not stages), -2.6)
        axes.axis("off")
        _fill(axes, config, stages)
        metadata: dict[str, Any] = {"Date": None} if file.suffix.lower() == ".svg" else {}
        try:
            figure.savefig(file, metadata=metadata)
        except OSError as error:
            raise PlotError(f"--plot: {error}") from None


def stages_of(config: Step35Config, layout: str, pipeline: int | None) -> list[Stage]:
    """The stages of a layout, by Megatron-Core's own reading of it.

    Args:
        config: The model.
        layout: As for `draw`.
        pipeline: As there.

    Raises:
        PlotError: Megatron-Core is missing, or does not take the layout for this model.
    """
    mtp = config.num_nextn_predict_layers
    try:
        with without_upstream_notices():
            from megatron.core.transformer.enums import LayerType
            from megatron.core.transformer.pipeline_parallel_layer_layout import (
                PipelineParallelLayerLayout,
            )
        if pipeline is None:
            pipeline = len(PipelineParallelLayerLayout.parse_str_to_list(layout))
        if pipeline < 1:
            raise PlotError(f"--pp: expected 1 or more, found {pipeline}")
        parsed = PipelineParallelLayerLayout(layout, pipeline)
        if LayerType.mtp not in parsed.flatten_layout:
            mtp = 0  # a model may be trained without
        parsed.validate_layer_layout(config.num_hidden_layers, mtp or None)
    except ImportError as error:
        raise PlotError(f"--pipeline-layout: Megatron-Core can't be imported: {error}") from None
    except (AssertionError, NotImplementedError) as error:
        raise PlotError(
            f"--pipeline-layout: Megatron-Core does not take {layout!r} with {pipeline} pipeline "
            f"ranks for {config.num_hidden_layers} layers and {mtp} MTP layers: {error}"
        ) from None
    stages, following = [], {"decoder": 0, "mtp": config.num_hidden_layers}
    for chunk in range(parsed.virtual_pipeline_model_parallel_size):
        for rank in range(pipeline):
            kinds = [kind.name for kind in parsed.layout[rank][chunk]]
            layers = []
            for kind in kinds:
                if kind in following:
                    layers.append(following[kind])
                    following[kind] += 1
            others = tuple(kind for kind in kinds if kind not in following)
            stages.append(Stage(rank, chunk, tuple(layers), others))
    return stages


# --- What is in the cells -----------------------------------------------------------------------


def _attention(plan: LayerPlan) -> tuple[str, str]:
    colour = _DARK if plan.attention_type == FULL_ATTENTION else _LIGHT
    return f"{plan.num_attention_heads}", colour


def _window(plan: LayerPlan) -> tuple[str, str]:
    if plan.window_size is None:
        return "all", _DARK
    return short(plan.window_size[0] + 1), _LIGHT


def _rope_base(plan: LayerPlan) -> tuple[str, str]:
    return short(plan.rotary_base), _DARK if plan.attention_type == FULL_ATTENTION else _LIGHT


def _rotated(plan: LayerPlan) -> tuple[str, str]:
    return short(100 * plan.rotary_percent), _NONE


def _scaling(plan: LayerPlan) -> tuple[str, str]:
    return (f"x{short(plan.rope_scaling.factor)}", _MIDDLE) if plan.rope_scaling else ("", _NONE)


def _ffn(plan: LayerPlan) -> tuple[str, str]:
    return ("M", _MIDDLE) if plan.is_moe else ("D", _NONE)


def _clamp(limit: float | None) -> tuple[str, str]:
    return ("", _NONE) if limit is None else (short(limit), _DARK)


_ROWS: tuple[tuple[str, Callable[[LayerPlan], tuple[str, str]]], ...] = (
    ("query heads", _attention),
    ("keys seen", _window),
    ("RoPE base", _rope_base),
    ("rotated, %", _rotated),
    ("RoPE scaling", _scaling),
    ("FFN", _ffn),
    ("clamp, routed", lambda plan: _clamp(plan.swiglu_limit)),
    ("clamp, shared or dense", lambda plan: _clamp(plan.swiglu_limit_shared)),
)


def short(number: float) -> str:
    """A number in few letters, of three digits from 10000 on: 512, 4096, 10k, 5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size and (number >= 1e4 or number % size == 0):
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


# --- Drawing ------------------------------------------------------------------------------------


def _fill(axes: Axes, config: Step35Config, stages: Sequence[Stage]) -> None:
    plans = config.layers
    decoder, last = config.num_hidden_layers, len(plans)
    _text(axes, -_LABELS + 0.4, -2.1, _title(config), size=10, align="left", weight="bold")
    _text(axes, decoder / 2, -1.0, "decoder", size=8)
    if last > decoder:
        _text(axes, (_x(decoder, config) + _x(last - 1, config) + 1) / 2, -1.0, "MTP", size=8)
    _label(axes, -0.4, "layer")
    for plan in plans:
        _text(axes, _x(plan.index, config) + 0.5, -0.4, f"{plan.index}", size=7)
    for row, (name, cell) in enumerate(_ROWS):
        _label(axes, row + 0.5, name)
        for plan in plans:
            _cell(axes, _x(plan.index, config), row, 1, *cell(plan))
    row = len(_ROWS)
    if stages:
        _stages(axes, config, stages, row + 0.3)
        row += 2
    _legend(axes, config, stages, row + 0.9)


def _x(layer: int, config: Step35Config) -> float:
    return layer + (_GAP if layer >= config.num_hidden_layers else 0.0)


def _title(config: Step35Config) -> str:
    total = sum(tensor.num_elements for tensor in published_tensors(config))
    mtp = config.num_nextn_predict_layers
    return (
        f"{config.model_type}: {config.num_hidden_layers} layers, {mtp} MTP layers, hidden size "
        f"{config.hidden_size}, {total / 1e9:.4g} billion parameters"
    )


def _stages(axes: Axes, config: Step35Config, stages: Sequence[Stage], top: float) -> None:
    _label(axes, top + 0.5, "pipeline rank")
    for number, stage in enumerate(stages):
        colour = _LIGHT if number % 2 else _NONE
        _spans(axes, config, stage.layers, top, f"{stage.rank}", colour)
    chunks = sorted({stage.chunk for stage in stages})
    if len(chunks) == 1:
        return
    _label(axes, top + 1.5, "chunk of the rank")
    for chunk in chunks:
        layers = [layer for s in stages if s.chunk == chunk for layer in s.layers]
        _spans(axes, config, layers, top + 1, f"{chunk}", _LIGHT if chunk % 2 else _NONE)


def _spans(
    axes: Axes, config: Step35Config, layers: Sequence[int], top: float, text: str, colour: str
) -> None:
    """A cell over layers that stand together; two where the MTP layers begin between them."""
    first = config.num_hidden_layers
    for part in ([n for n in layers if n < first], [n for n in layers if n >= first]):
        if part:
            _cell(axes, _x(part[0], config), top, len(part), text, colour)


def _legend(axes: Axes, config: Step35Config, stages: Sequence[Stage], top: float) -> None:
    plans = config.layers
    full = any(plan.attention_type == FULL_ATTENTION for plan in plans)
    sliding = any(plan.attention_type != FULL_ATTENTION for plan in plans)
    groups = sorted({plan.num_query_groups for plan in plans})
    dims = sorted({plan.kv_channels for plan in plans})
    entries = []
    if full:
        entries.append((_DARK, "", "full attention"))
    if sliding:
        entries.append((_LIGHT, "", f"sliding attention, window {config.sliding_window}"))
    if any(plan.is_moe for plan in plans):
        entries.append(
            (
                _MIDDLE,
                "M",
                f"MoE: top {config.moe_top_k} of {config.moe_num_experts} experts of "
                f"{config.moe_intermediate_size}, shared {config.share_expert_dim}",
            )
        )
    entries.append((_NONE, "D", f"dense, {config.intermediate_size}"))
    x = -_LABELS + 0.6
    for colour, letter, text in entries:
        _cell(axes, x, top, 1, letter, colour)
        _text(axes, x + 1.3, top + 0.5, text, size=8, align="left")
        x += 2.2 + 0.27 * len(text)
    notes = [
        f"{', '.join(map(str, groups))} key/value groups, head dimension "
        f"{', '.join(map(str, dims))}. Clamps: limits after SwiGLU's activation. Empty: none."
    ]
    if stages:
        ends = ", ".join(
            f"{other} on rank {stage.rank}" for stage in stages for other in stage.others
        )
        empty = sum(not stage.layers for stage in stages)
        without = f"; {empty} stage(s) without a layer" * bool(empty)
        notes.append(f"{len(stages)} pipeline stages, in order: {ends}{without}.")
    for number, note in enumerate(notes):
        _text(axes, -_LABELS + 0.6, top + 1.9 + number, note, size=8, align="left")


def _cell(axes: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, 1, facecolor=colour, edgecolor=_EDGE, linewidth=0.6))
    if text:
        size = 7 if len(text) <= 3 * width else 5.5
        ink = "white" if colour == _DARK else "black"
        _text(axes, x + width / 2, y + 0.5, text, size=size, colour=ink)


def _label(axes: Axes, y: float, text: str) -> None:
    _text(axes, -0.4, y, text, size=8, align="right")


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    align: str = "center",
    colour: str = "black",
    weight: str = "normal",
) -> None:
    axes.text(x, y, text, fontsize=size, ha=align, va="center", color=colour, weight=weight)
