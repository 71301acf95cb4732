"""Is the model that was built the one that was meant? Checked once, right after construction."""

from __future__ import annotations

import functools

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from step35_patch._version import __version__
from step35_patch.model.attention import Step35SelfAttention
from step35_patch.model.description import Step35Runtime, runtime_for
from step35_patch.model.layer import Step35DecoderLayer
from step35_patch.model.named_options import differences
from step35_patch.model.swiglu import ClampedSwiGLU
from step35_patch.tensors.qkv_layout import QkvLayout


def refuse_other_kind(model: torch.nn.Module, config: TransformerConfig) -> None:
    """Raise NotImplementedError where a model that is no GPTModel is made from a Step-3.5 config.

    Megatron-Core would build it of its own layers, which know nothing of Step-3.5's.

    Args:
        model: the model, before its constructor has run.
        config: of its language model.
    """
    # The package's own has layers of its own: `step35_patch.model.experimental_hybrid`.
    is_ours = type(model).__module__.startswith("step35_patch.")
    if is_ours or isinstance(model, GPTModel) or runtime_for(config) is None:
        return
    name = type(model).__name__
    raise NotImplementedError(
        f"{name}: expected a GPTModel for the Step-3.5 config, whose layers step35_patch "
        f"exchanges; those of {name} would be Megatron-Core's own. Train with pretrain_gpt.py, or "
        "leave step35_patch out of this program"
    )


def check_model(model: torch.nn.Module, runtime: Step35Runtime) -> None:
    """Raise RuntimeError, listing every module that Step-3.5 should not be made of.

    Args:
        model: a GPTModel (one pipeline stage or model chunk).
        runtime: the Step-3.5 model that it should be.
    """
    problems: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Step35DecoderLayer):
            problems += [f"{name}: {problem}" for problem in _layer_problems(module)]
        elif isinstance(module, TransformerLayer):
            problems.append(f"{name}: a stock {type(module).__name__}, expected Step35DecoderLayer")
        elif isinstance(module, Attention) and not isinstance(module, Step35SelfAttention):
            problems.append(f"{name}: {type(module).__name__}, expected Step35SelfAttention")
    if problems:
        raise RuntimeError(
            "the model is not the Step-3.5 model of the config:\n  "
            + "\n  ".join(problems)
            + "\nIts specs were made around step35_patch: use get_gpt_decoder_block_spec and "
            "get_gpt_mtp_block_spec, and import step35_patch before building the model."
        )


def _layer_problems(layer: Step35DecoderLayer) -> list[str]:
    problems = []
    attention = layer.self_attention
    if isinstance(attention.core_attention, DotProductAttention):
        problems.append("core attention is DotProductAttention, which does not know the window")
    gate_layout = layer.config.step35.gate_layout if layer.config.attention_output_gate else None
    expected = QkvLayout.of(layer.plan, gate_layout).share(attention.world_size).rows
    found = attention.linear_qkv.weight.shape[0]
    if found != expected:
        problems.append(f"linear_qkv has {found} rows, expected {expected}")
    places = [("mlp", layer.mlp, layer.plan.swiglu_limit_shared)]
    if layer.plan.is_moe:
        experts = layer.mlp.experts
        places = [("shared_experts", layer.mlp.shared_experts, layer.plan.swiglu_limit_shared)]
        places += [
            ("experts", expert, layer.plan.swiglu_limit)
            for expert in getattr(experts, "local_experts", [experts])
        ]
    for place, module, limit in places:
        activation = module.activation_func
        found = activation.limit if isinstance(activation, ClampedSwiGLU) else None
        if found != limit:
            problems.append(f"{place} clamps at {found}, expected {limit}")
    return problems


def announce(runtime: Step35Runtime, config: TransformerConfig, vocab_size: int) -> None:
    """Print, on rank 0, what is being built, and in a second line what is not as published.

    Once for a model of several chunks.

    Args:
        runtime: the Step-3.5 model.
        config: the TransformerConfig that it is built with.
        vocab_size: of the embedding and the output layer, with what pads them.
    """
    changed = differences(config)
    if vocab_size > runtime.config.vocab_size and runtime.padded_logits == "kept":
        changed.append("padded_logits='kept' (published: 'masked'; losses of a larger vocabulary)")
    built, published = config.mtp_num_layers or 0, runtime.config.num_nextn_predict_layers
    if built < published:
        changed.append(
            f"mtp_num_layers={built} (published: {published}; the others are not trained)"
        )
    notes = []
    if runtime.config.moe_layers_enum and config.moe_router_bias_update_rate == 0:
        notes.append("router bias fixed")
    if padded := vocab_size - runtime.config.vocab_size:
        notes.append(f"{padded} padded columns {runtime.padded_logits}")
    _print_once(runtime, tuple(notes), tuple(changed))


@functools.lru_cache(maxsize=1)
def _print_once(runtime: Step35Runtime, notes: tuple[str, ...], changed: tuple[str, ...]) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    from megatron.core import __version__ as megatron_version

    layers = runtime.layers
    decoder = [plan for plan in layers if not plan.is_mtp]
    sliding = sum(plan.attention_type == "sliding_attention" for plan in decoder)
    print(
        f"step35_patch {__version__} on Megatron-Core {megatron_version}: "
        f"config {runtime.source} ({runtime.config.fingerprint[:12]}), gate {runtime.gate_layout}, "
        f"window {runtime.window}, {len(decoder) - sliding} full + {sliding} sliding layers, "
        f"{sum(plan.is_moe for plan in decoder)} MoE, {len(layers) - len(decoder)} MTP"
        + "".join(f", {note}" for note in notes),
        flush=True,
    )
    if changed:
        print(f"step35_patch: differs from the published model: {'; '.join(changed)}", flush=True)
