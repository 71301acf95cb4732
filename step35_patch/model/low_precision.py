"""Sizes of linear layers that Transformer Engine does not multiply in FP8 or FP4.

Its `assert_dim_for_fp8_exec` asks for rows that 8 divides and columns that 16 divides, and its GEMM
(`CanonicalizeGemmInput` in cublaslt_gemm.cu) for leading dimensions that 16 divides. The rows of a
weight are one in backward, so that 16 has to divide both. Blocks of MXFP8 are 32 long, and so is
what NVFP4's kernels take at a time (NVTE_CHECKs of quantizer.cpp, quantize_transpose_nvfp4.cuh).
A run would end in the first such layer. No torch is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from step35_patch.config.errors import ranges
from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.tensors.table import Cut, Row, tensor_table

_DIVISOR, _DIVISOR_OF_BLOCKS = 16, 32


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Tensor-parallel sizes: of all but the routed experts, and of those."""

    tensor: int
    expert_tensor: int

    def of(self, row: Row) -> int:
        return self.expert_tensor if row.is_expert else self.tensor


def low_precision_problems(settings: Any, config: Step35Config, gate_layout: str) -> list[Problem]:
    """One that names the linear layers that could not be computed, and ways out; or none.

    Args:
        settings: A TransformerConfig, or Megatron's parsed arguments.
        config: The model.
        gate_layout: "headwise" or "expanded".
    """
    field = next((name for name in ("fp8", "fp4") if getattr(settings, name, None)), None)
    by_module = ("quant_recipe", "te_precision_config_file")  # decide by each module's name
    if (
        field is None
        or settings.transformer_impl == "local"
        or any(getattr(settings, name, None) for name in by_module)
    ):
        return []
    recipe = getattr(settings, f"{field}_recipe")
    recipe = str(getattr(recipe, "value", recipe))
    divisor = _DIVISOR_OF_BLOCKS if field == "fp4" or recipe == "mxfp8" else _DIVISOR
    tp = settings.tensor_model_parallel_size
    sizes = _Sizes(tp, settings.expert_tensor_parallel_size or tp)
    wrong: dict[str, list[int]] = {}
    for row, layer in _low_precision_rows(settings, config, gate_layout):
        for words in _indivisible(row, sizes, divisor):
            wrong.setdefault(words, []).append(layer)
    if not wrong:
        return []
    found = ", ".join(f"{words} (layers {ranges(layers)})" for words, layers in wrong.items())
    ways = ", or ".join(_ways_out(settings, config, gate_layout, sizes, divisor))
    return [
        Problem(
            field,
            f"linear layers with rows and columns on each rank that {divisor} divides, as "
            f"Transformer Engine needs for the recipe {recipe}",
            found,
            ways,
        )
    ]


def _low_precision_rows(
    settings: Any, config: Step35Config, gate_layout: str
) -> Iterator[tuple[Row, int]]:
    """The weights of linear layers that are not left in 16 bits, each with its layer's index."""
    first, last = 0, config.num_hidden_layers
    if settings.first_last_layers_bf16:
        first += settings.num_layers_at_start_in_bf16
        last -= settings.num_layers_at_end_in_bf16
    for row in tensor_table(config, gate_layout, mtp_layers=settings.mtp_num_layers or 0):
        # Norms and routers are whole on each rank; what has the vocabulary's rows is not in FP8.
        if row.layer is None or row.cut is Cut.WHOLE or row.is_vocabulary:
            continue
        if row.layer.is_mtp or first <= row.layer.index < last:
            yield row, row.layer.index


def _indivisible(row: Row, sizes: _Sizes, divisor: int) -> Iterator[str]:
    """What is wrong with a weight's rows and columns, in words."""
    ranks = sizes.of(row)
    kind = "expert-tensor-parallel" if row.is_expert else "tensor-parallel"
    for what, size, cut in (
        ("rows", row.shape[-2], Cut.ROWS),
        ("columns", row.shape[-1], Cut.COLUMNS),
    ):
        parts = ranks if row.cut is cut else 1
        if size % (parts * divisor):
            yield f"{row.path.removesuffix('.weight')} with {size / parts:.10g} {what}" + (
                f" on each of {parts} {kind} ranks" if parts > 1 else ""
            )


def _ways_out(
    settings: Any, config: Step35Config, gate_layout: str, sizes: _Sizes, divisor: int
) -> Iterator[str]:
    """What else could be computed, in words."""

    def fits(layout: str, of: _Sizes) -> bool:
        rows = _low_precision_rows(settings, config, layout)
        return not any(problem for row, _ in rows for problem in _indivisible(row, of, divisor))

    if config.use_head_wise_attn_gate and gate_layout == "headwise" and fits("expanded", sizes):
        yield "use the gate layout expanded"
    groups = config.num_attention_groups
    others = [
        tp
        for tp in range(1, groups + 1)
        if groups % tp == 0
        and fits(
            gate_layout,
            _Sizes(tp, tp if sizes.expert_tensor == sizes.tensor else sizes.expert_tensor),
        )
    ]
    if others:
        yield f"tensor_model_parallel_size {' or '.join(map(str, others))}"
    yield "leave it out"
