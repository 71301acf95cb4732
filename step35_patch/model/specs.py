"""From Megatron-Core's layer specs to Step-3.5's.

The stock builders decide what a layer is made of (Transformer Engine or local modules, fused
norms, expert implementation); the functions here take their result and exchange what Step-3.5
needs otherwise. Nothing is exchanged in place: specs of one builder call share objects.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer

from step35_patch.model.attention import Step35SelfAttention, build_headwise_qkv
from step35_patch.model.core_attention import Step35DotProductAttention
from step35_patch.model.description import Step35Runtime
from step35_patch.model.experts import Step35SequentialMLP
from step35_patch.model.layer import Step35DecoderLayer
from step35_patch.model.mtp import Step35MultiTokenPredictionLayer
from step35_patch.model.norm import Step35RMSNorm
from step35_patch.model.swiglu import ClampedSwiGLU, routed_swiglu, shared_swiglu

try:  # Apex's norm stands where WrappedTorchNorm does when Apex is installed.
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

    _LOCAL_NORMS: tuple[type, ...] = (WrappedTorchNorm, FusedLayerNorm)
except ImportError:
    _LOCAL_NORMS = (WrappedTorchNorm,)


def step35_norm(norm: Any) -> Any:
    """The zero-centred norm in place of a local one; Transformer Engine's norms stay."""
    return Step35RMSNorm if norm in _LOCAL_NORMS else norm


def _submodules(builder: Any) -> Any:
    """Those of a ModuleSpec or of a functools.partial."""
    if isinstance(builder, ModuleSpec):
        return builder.submodules
    if isinstance(builder, functools.partial) and "submodules" in builder.keywords:
        return builder.keywords["submodules"]
    raise TypeError(
        f"MLP spec: expected a ModuleSpec or functools.partial with submodules, found {builder!r}; "
        "this Megatron-Core builds its specs in a way that step35_patch does not know"
    )


def has_experts(mlp: Any) -> bool:
    """Whether an MLP's builder is a MoE layer's."""
    return hasattr(_submodules(mlp), "experts")


def _replace_submodules(builder: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a ModuleSpec or functools.partial with `change` applied to its submodules."""
    submodules = change(_submodules(builder))
    if isinstance(builder, ModuleSpec):
        return dataclasses.replace(builder, submodules=submodules)
    keywords = {**builder.keywords, "submodules": submodules}
    return functools.partial(builder.func, *builder.args, **keywords)


def _experts(builder: Any) -> Any:
    """The routed experts' builder with their activation, and sequential ones as Step-3.5's."""
    builder = _with_activation(builder, routed_swiglu)
    if isinstance(builder, ModuleSpec):
        is_sequential = builder.module is SequentialMLP
        return (
            dataclasses.replace(builder, module=Step35SequentialMLP) if is_sequential else builder
        )
    if builder.func is not SequentialMLP:
        return builder
    return functools.partial(Step35SequentialMLP, *builder.args, **builder.keywords)


def _with_activation(builder: Any, activation: Callable[..., ClampedSwiGLU]) -> Any:
    return _replace_submodules(
        builder, lambda submodules: dataclasses.replace(submodules, activation_func=activation)
    )


def _mlp(builder: Any) -> Any:
    """The MLP's builder with the clamped activations: a dense one's, or those of the experts."""
    if not has_experts(builder):
        return _with_activation(builder, shared_swiglu)
    return _replace_submodules(
        builder,
        lambda submodules: dataclasses.replace(
            submodules,
            experts=_experts(submodules.experts),
            shared_experts=_with_activation(submodules.shared_experts, shared_swiglu),
        ),
    )


def _self_attention(spec: ModuleSpec, runtime: Step35Runtime) -> ModuleSpec:
    if spec.module is not SelfAttention:
        raise TypeError(
            f"self-attention spec: expected Megatron-Core's SelfAttention, found {spec.module!r}"
        )
    parts = spec.submodules
    changes = {
        "q_layernorm": step35_norm(parts.q_layernorm),
        "k_layernorm": step35_norm(parts.k_layernorm),
    }
    if parts.core_attention is DotProductAttention:
        changes["core_attention"] = Step35DotProductAttention
    if runtime.config.use_head_wise_attn_gate and runtime.gate_layout == "headwise":
        changes["linear_qkv"] = functools.partial(build_headwise_qkv, parts.linear_qkv)
    return dataclasses.replace(
        spec, module=Step35SelfAttention, submodules=dataclasses.replace(parts, **changes)
    )


def decoder_layer_spec(spec: ModuleSpec, runtime: Step35Runtime) -> ModuleSpec:
    """The Step-3.5 spec made from a stock TransformerLayer spec, dense or MoE.

    A spec that is one of ours already is returned as it is.

    Raises:
        TypeError: the spec is of a kind that this package does not know.
    """
    if spec.module is Step35DecoderLayer:
        return spec
    if spec.module is not TransformerLayer:
        raise TypeError(
            f"layer spec: expected Megatron-Core's TransformerLayer, found {spec.module!r}"
        )
    parts = spec.submodules
    names = dict(parts.sharded_state_dict_keys_map)
    if has_experts(parts.mlp):
        # The local specs give the norm before a MoE layer the name it has before a dense one; here
        # it is Transformer Engine's, the norm's own. Weights have one name in both implementations
        # then; for what else a checkpoint holds see `step35_patch.model.extra_state`.
        names.pop("pre_mlp_layernorm.", None)
    return dataclasses.replace(
        spec,
        module=Step35DecoderLayer,
        submodules=dataclasses.replace(
            parts,
            input_layernorm=step35_norm(parts.input_layernorm),
            self_attention=_self_attention(parts.self_attention, runtime),
            pre_mlp_layernorm=step35_norm(parts.pre_mlp_layernorm),
            mlp=_mlp(parts.mlp),
            sharded_state_dict_keys_map=names,
        ),
    )


def mtp_layer_spec(spec: ModuleSpec, inner: ModuleSpec) -> ModuleSpec:
    """The Step-3.5 MTP layer spec: a stock one with zero-centred norms, `inner` as its layer."""
    if spec.module is not MultiTokenPredictionLayer:
        raise TypeError(
            f"MTP spec: expected Megatron-Core's MultiTokenPredictionLayer, found {spec.module!r}"
        )
    parts = spec.submodules
    return dataclasses.replace(
        spec,
        module=Step35MultiTokenPredictionLayer,
        submodules=dataclasses.replace(
            parts,
            enorm=step35_norm(parts.enorm),
            hnorm=step35_norm(parts.hnorm),
            layer_norm=step35_norm(parts.layer_norm),
            mtp_model_layer=inner,
        ),
    )
