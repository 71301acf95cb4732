"""The reference's side of a comparison: transformers' Step3p7, layer by layer.

Each layer is made anew when it is computed, without storage. A name of `transformers` stands for
one of this package's published names as `_published_name` says.

Shapes: b sequences, s tokens, h hidden size. Hidden states are [b, s, h] here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import MtpLayer
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7DecoderLayer,
    Step3p7RMSNorm,
    Step3p7RotaryEmbedding,
)

from step35_patch.config.layer_plan import FULL_ATTENTION, LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.tensors.published import Weights
from step35_patch.tensors.table import FINAL_NORM
from step35_patch.verify.loading import Embedding, WithoutStorage, load_when_called, own_tensors


class _ExpertWeights:
    """Stands for a weight [experts, ., .] of Step3p7Experts, which takes one expert at a time."""

    def __init__(self, load: Callable[[int], Tensor]):
        self._load = load

    def __getitem__(self, expert: Tensor) -> Tensor:
        return self._load(int(expert))


def _reference_config(document: dict[str, Any]) -> Step3p7TextConfig:
    config = Step3p7TextConfig.from_dict(document)
    # The eager implementation keeps all scores, which at long context is more than the weights.
    config._attn_implementation = "sdpa"
    return config


def _mtp_document(config: Step35Config) -> dict[str, Any]:
    """The config of the MTP layers as if they were a whole model: transformers' own has none.

    Lists that end with the decoder's layers go on as `Step35Config` says.
    """
    document, first = config.to_dict(), config.num_hidden_layers
    plans = config.layers[first:]
    behind_the_end = {
        "layer_types": [plan.attention_type for plan in plans],
        "rope_theta": [plan.rotary_base for plan in plans],
        "partial_rotary_factors": [plan.rotary_percent for plan in plans],
        "swiglu_limits": [plan.swiglu_limit for plan in plans],
        "swiglu_limits_shared": [plan.swiglu_limit_shared for plan in plans],
    }
    for name, tail in behind_the_end.items():
        if isinstance(document.get(name), list):
            document[name] = document[name][first:] or tail
    # What transformers derives from the lists above and writes beside them.
    for name in ("mtp_layer_types", "mtp_mlp_layer_types", "per_layer_config", "moe_layers_enum"):
        document.pop(name, None)
    return document | {
        "mlp_layer_types": ["dense"] * len(plans),
        "num_hidden_layers": len(plans),
        "num_nextn_predict_layers": 0,
    }


class _Attention(NamedTuple):
    """What the model computes once and hands to each layer of a kind."""

    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]
    positions: Tensor


def _attention(config: Step3p7TextConfig, index: int, hidden: Tensor) -> _Attention:
    """For layer `index` of a config, called with hidden [b, s, h]."""
    kind = config.layer_types[index]
    positions = torch.arange(hidden.shape[1])[None]
    make_mask = create_causal_mask if kind == FULL_ATTENTION else create_sliding_window_causal_mask
    # By position: what stands for the missing cache has another name in each version.
    mask = make_mask(config, hidden, None, None, positions)
    return _Attention(mask, Step3p7RotaryEmbedding(config)(hidden, positions, kind), positions)


class ReferenceSide:
    """transformers' Step3p7, layer by layer.

    Args:
        config: of the model.
        weights: its weights.
        tokens: [b, s].
        dtype: what is computed in; the router computes in float32.
    """

    def __init__(self, config: Step35Config, weights: Weights, tokens: Tensor, dtype: torch.dtype):
        self._config, self._weights, self._dtype = config, weights, dtype
        self.embedding = Embedding(weights, config.vocab_size, tokens, dtype)
        self._mtp_tokens = tokens
        self._decoder = _reference_config(config.to_dict())
        self._mtp = _reference_config(_mtp_document(config))

    def layer(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """A decoder layer: [b, s, h] -> [b, s, h].

        Returns:
            The output, and for MoE the gap [b * s] between the scores of the last expert that was
            chosen and of the next one.
        """
        with WithoutStorage():
            layer = Step3p7DecoderLayer(self._decoder, index)
        self._connect(layer, "", self._config.layers[index])
        gaps: list[Tensor] = []
        if self._config.layers[index].is_moe:
            bias = self._weights.get(f"model.layers.{index}.moe.router_bias")
            layer.mlp.gate.register_forward_hook(
                lambda module, args, output: gaps.append(self._gap(output[0], bias))
            )
        attention = _attention(self._decoder, index, hidden)
        output = layer(
            hidden,
            attention_mask=attention.mask,
            position_embeddings=attention.rotary,
            position_ids=attention.positions,
        )
        return output, gaps[0] if gaps else None

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm: [b, s, h] -> [b, s, h]."""
        with WithoutStorage():
            norm = Step3p7RMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        load_when_called(norm, {"weight": partial(self._weights.get, FINAL_NORM)}, self._dtype)
        normed: Tensor = norm(hidden)
        return normed

    def mtp_layer(self, depth: int, hidden: Tensor) -> Tensor:
        """MTP layer `depth`, called in order: the normed states [b, s, h] -> those after it."""
        self._mtp_tokens = F.pad(self._mtp_tokens[:, 1:], (0, 1))
        with WithoutStorage():
            layer = MtpLayer(self._mtp, Step3p7DecoderLayer, Step3p7RMSNorm, depth)
        plan = self._config.layers[self._config.num_hidden_layers + depth]
        self._connect(layer, "mtp_block.", plan)
        embeddings = self.embedding(self._mtp_tokens)
        attention = _attention(self._mtp, depth, hidden)
        # By position, as in `_attention`; the last one is the cache.
        normed: Tensor = layer(
            embeddings, hidden, attention.rotary, attention.mask, attention.positions, None
        )
        return normed

    def _gap(self, logits: Tensor, bias: Tensor) -> Tensor:
        scores = torch.sigmoid(logits.float()) + bias
        chosen = self._config.moe_top_k
        if chosen is None or chosen == scores.shape[-1]:
            return torch.full_like(scores[:, 0], torch.inf)
        best = scores.topk(chosen + 1).values
        return best[:, -2] - best[:, -1]

    def _connect(self, module: torch.nn.Module, layer: str, plan: LayerPlan) -> None:
        """Let the modules of a layer load their published tensors.

        Args:
            module: the layer, without storage.
            layer: prefix of the decoder layer's modules in `module`.
            plan: of the layer.
        """
        module.eval()
        prefix = f"model.layers.{plan.index}."
        for path, leaf in module.named_modules():
            names = [name for name, _ in own_tensors(leaf)]
            inner = path.removeprefix(layer)
            if inner == "mlp.experts":
                self._connect_experts(leaf, prefix + "moe.")
            elif names:
                loads = {name: self._load(prefix, f"{inner}.{name}", plan) for name in names}
                # Of a router in float32 the logits are float32 too (`need_fp32_gate`).
                load_when_called(leaf, loads, torch.float32 if inner == "mlp.gate" else self._dtype)

    def _load(self, prefix: str, name: str, plan: LayerPlan) -> Callable[[], Tensor]:
        """Reads what transformers calls `name`, within the layer."""
        published = prefix + _published_name(name)
        if not self._config.use_head_wise_attn_gate:
            # The reference has no way without a gate: sigmoid(0) = 1/2, so its output counts twice.
            if name == "self_attn.g_proj.weight":
                return partial(torch.zeros, plan.num_attention_heads, self._config.hidden_size)
            if name == "self_attn.o_proj.weight":
                return lambda: 2 * self._weights.get(published)
        return partial(self._weights.get, published)

    def _connect_experts(self, experts: torch.nn.Module, prefix: str) -> None:
        def gate_up(expert: int) -> Tensor:
            names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
            return torch.cat([self._weights.get(name, expert) for name in names]).to(self._dtype)

        def down(expert: int) -> Tensor:
            return self._weights.get(f"{prefix}down_proj.weight", expert).to(self._dtype)

        for name, load in {"gate_up_proj": gate_up, "down_proj": down}.items():
            delattr(experts, name)
            setattr(experts, name, _ExpertWeights(load))


def _published_name(name: str) -> str:
    """The published name of what transformers calls `name`, both within a layer."""
    return (
        name.replace("mlp.gate.weight", "moe.gate.weight")
        .replace("mlp.gate.e_score_correction_bias", "moe.router_bias")
        .replace("mlp.shared_experts.", "share_expert.")
        .replace("post_norm.weight", "transformer.shared_head.norm.weight")
    )
