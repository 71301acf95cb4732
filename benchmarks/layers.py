"""The layers that benchmarks count: ours, and stock Megatron-Core's of the same shape.

All on Transformer Engine's Python with the stand-in of tests/support, in bf16, with the options
that pretrain_gpt.py has by default: fused RoPE, bias + dropout + add, and SwiGLU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
TRANSFORMER_ENGINE = HERE.parent / ".venv" / "transformer-engine"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Sizes:
    """Of the published model, but for what makes counting slow: tokens and experts."""

    hidden: int = 4096
    dense: int = 11264
    expert: int = 1280
    heads: int = 64
    sliding_heads: int = 96
    groups: int = 8
    channels: int = 128
    window: int = 512
    experts: int = 288
    chosen: int = 8


@dataclass(frozen=True)
class Shape:
    """One layer's."""

    attention: str
    mlp: str  # dense or moe
    clamped: bool = False

    @property
    def name(self) -> str:
        return f"{self.attention.split('_')[0]} {self.mlp}{' clamped' * self.clamped}"


def prepare() -> None:
    """Put the stand-ins in place, before Megatron-Core is imported."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]
    if str(TRANSFORMER_ENGINE) not in sys.path:
        sys.path.append(str(TRANSFORMER_ENGINE))
    from step35_patch import cpu

    cpu.install()
    import counting
    from support import te_on_cpu

    # Megatron-Core takes its jit_fuser from here.
    torch.compile = counting.compile_counted
    te_on_cpu.install(cudnn=True)
    activate()


def activate() -> None:
    """Make this process Megatron-Core's only rank, with this package in it."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
    from support.ours import initialize_megatron

    import step35_patch

    step35_patch.activate()
    initialize_megatron()


def without_products() -> None:
    """Let matrix products give zeros, and weights be anything, for widths that would take long."""
    from support.te_on_cpu import matmul

    def zeros(a: torch.Tensor, transa: bool, b: torch.Tensor, transb: bool) -> torch.Tensor:
        rows = a.reshape(-1, a.shape[-1])
        columns = rows.shape[0] if transa else rows.shape[1]
        if transb:
            return torch.zeros(b.shape[-1], columns)
        return torch.zeros(*b.shape[:-1], columns)

    def anything(weight: torch.Tensor) -> torch.Tensor:
        # The router's, by which tokens find their experts, is small.
        return weight.data.normal_() if weight.numel() < 100_000 else weight

    matmul._matmul = zeros
    OPTIONS.update(init_method=anything, output_layer_init_method=anything)


OPTIONS: dict[str, Any] = {
    "transformer_impl": "transformer_engine",
    "use_cpu_initialization": True,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "apply_rope_fusion": True,
    "bias_dropout_fusion": True,
    "bias_activation_fusion": True,
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}


FUSED_ROUTER = {"moe_router_fusion": True}


def ours(shape: Shape, sizes: Sizes, **overrides: Any) -> torch.nn.Module:
    """Our layer; `overrides` are fields of its provider."""
    from step35_patch import Step35ModelProvider

    config = {
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.dense,
        "vocab_size": 128,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "layer_types": [shape.attention],
        "num_attention_heads": sizes.heads,
        "num_attention_groups": sizes.groups,
        "head_dim": sizes.channels,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": sizes.sliding_heads,
            "num_attention_groups": sizes.groups,
            "head_dim": sizes.channels,
        },
        "sliding_window": sizes.window,
        "rope_theta": [1e4],
        "partial_rotary_factors": [_rotated(shape)],
        "swiglu_limits": [7.0 if shape.clamped and shape.mlp == "moe" else 0.0],
        "swiglu_limits_shared": [16.0 if shape.clamped else 0.0],
        "moe_layers_enum": "0" if shape.mlp == "moe" else "",
        "moe_num_experts": sizes.experts,
        "moe_top_k": sizes.chosen,
        "moe_intermediate_size": sizes.expert,
        "share_expert_dim": sizes.expert,
        "moe_router_scaling_factor": 3.0,
        "use_head_wise_attn_gate": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        provider = Step35ModelProvider.from_hf(file, **OPTIONS, **overrides)
    return _layer(provider)


def stock(shape: Shape, sizes: Sizes, gate: bool, **overrides: Any) -> torch.nn.Module:
    """Megatron-Core's, without a clamp, with its own output gate or without any."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe = {
        "num_moe_experts": sizes.experts,
        "moe_router_topk": sizes.chosen,
        "moe_ffn_hidden_size": sizes.expert,
        "moe_shared_expert_intermediate_size": sizes.expert,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 3.0,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
    }
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.dense,
        num_attention_heads=_heads(shape, sizes),
        num_query_groups=sizes.groups,
        kv_channels=sizes.channels,
        window_size=(sizes.window - 1, 0) if shape.attention == SLIDING else None,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_output_gate=gate,
        **OPTIONS,
        **(moe if shape.mlp == "moe" else {}),
        **overrides,
    )
    return _layer(config)


def _layer(config: Any) -> torch.nn.Module:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.spec_utils import build_module

    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization="RMSNorm"
    )
    layer = build_module(spec.layer_specs[0], config=config, layer_number=1)
    return layer.to(torch.bfloat16).train()


def _heads(shape: Shape, sizes: Sizes) -> int:
    return sizes.sliding_heads if shape.attention == SLIDING else sizes.heads


def _rotated(shape: Shape) -> float:
    return 1.0 if shape.attention == SLIDING else 0.5


def rotary_table(shape: Shape, sizes: Sizes, tokens: int) -> torch.Tensor:
    """Angles for a stock layer; ours make their own, once for all layers of their kind."""
    width = int(sizes.channels * _rotated(shape))
    return torch.rand(tokens, 1, 1, width)
