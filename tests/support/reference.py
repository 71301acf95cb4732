"""The oracle of the parity tests: transformers' Step3p7 with our weights, in the published names.

`tiny_config` makes a small config.json with everything that the published one has,
`random_weights` weights for it that are not small, and `Reference` computes logits, losses and
gradients with transformers.models.step3p7 alone.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers.modeling_layers import MtpLayer
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7DecoderLayer,
    Step3p7RMSNorm,
    Step3p7RotaryEmbedding,
    Step3p7TextModel,
)

from step35_patch import Step35Config
from step35_patch.tensors.published import published_tensors

WINDOW = 8
# Kept out of the test tokens: the reference gives its embedding row no gradient.
PAD_TOKEN = 95

FULL, SLIDING = "full_attention", "sliding_attention"


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json of 6 layers and 2 MTP layers with the published pattern, `changes` applied.

    RoPE scaling's original length is so short that all three of its branches are met, and the
    clamps are so tight that they bite. A value of `...` removes the field.
    """
    types = [FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING]
    config = {
        "model_type": "step3p5",
        "torch_dtype": "float32",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_nextn_predict_layers": 2,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "layer_types": types,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 16,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 16,
        },
        "sliding_window": WINDOW,
        "rope_theta": [50.0 if kind == FULL else 10.0 for kind in types],
        "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in types],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 8.0,
        },
        "yarn_only_types": [FULL],
        "swiglu_limits": [0.0, 0.0, 0.0, 0.3, 0.0, 0.2, 0.0, 0.0],
        "swiglu_limits_shared": [0.4, 0.0, 0.0, 0.5, 0.0, 0.3, 0.0, 0.25],
        "moe_layers_enum": "2,3,4,5",
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 24,
        "share_expert_dim": 40,
        "moe_router_scaling_factor": 3.0,
        "use_head_wise_attn_gate": True,
        "pad_token_id": PAD_TOKEN,
    }
    config |= changes
    return {name: value for name, value in config.items() if value is not ...}


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights in the published names and the config's dtypes, large enough to show errors."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for info in published_tensors(Step35Config.from_dict(config)):
        noise = torch.randn(info.shape, generator=generator)
        if info.name.endswith("norm.weight"):
            weights[info.name] = 0.3 * noise
        elif info.name.endswith("router_bias"):
            weights[info.name] = 0.1 * noise
        elif "embed_tokens" in info.name:
            weights[info.name] = noise
        elif info.name.endswith("g_proj.weight"):
            weights[info.name] = 2.0 * noise / info.shape[-1] ** 0.5
        else:
            weights[info.name] = 1.2 * noise / info.shape[-1] ** 0.5
    return weights


def random_tokens(
    seed: int, batch: int, length: int, vocabulary: int = PAD_TOKEN
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels, both [batch, length]; the labels are the next tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(0, vocabulary, (batch, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def write_hf_folder(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """A folder in the published layout: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def config_of_layers(config: dict[str, Any], first: int, count: int) -> Step3p7TextConfig:
    """transformers' config of `count` layers from `first` on, as if they were a whole model."""
    total = config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    part = deepcopy(config)
    for name in (
        "layer_types",
        "rope_theta",
        "partial_rotary_factors",
        "swiglu_limits",
        "swiglu_limits_shared",
    ):
        value = part.get(name)
        if isinstance(value, list):
            if len(value) < total:
                tail = {"layer_types": SLIDING, "rope_theta": 10.0, "partial_rotary_factors": 1.0}
                value = value + [tail.get(name, 0.0)] * (total - len(value))
            part[name] = value[first : first + count]
    moe = part.get("moe_layers_enum") or ""
    moe = [int(i) for i in (moe.split(",") if isinstance(moe, str) else moe) if str(i).strip()]
    part["moe_layers_enum"] = [i - first for i in moe if first <= i < first + count]
    part |= {"num_hidden_layers": count, "num_nextn_predict_layers": 0}
    for ours, theirs in {
        "num_attention_groups": "num_key_value_heads",
        "moe_num_experts": "n_routed_experts",
        "moe_top_k": "num_experts_per_tok",
    }.items():
        if ours in part:
            part[theirs] = part.pop(ours)
    # Read by the published code only; for the reference they are unknown keyword arguments.
    for name in ("model_type", "yarn_only_types", "use_head_wise_attn_gate", "torch_dtype"):
        part.pop(name, None)
    for name in ("rms_norm_eps", "moe_router_scaling_factor"):  # it takes no integers for them
        part[name] = float(part[name])
    reference = Step3p7TextConfig(**part)
    reference._attn_implementation = "eager"
    return reference


def _reference_name(name: str) -> str:
    """The published name of a layer's tensor -> that of Step3p7DecoderLayer; experts apart."""
    return (
        name.replace("moe.gate.weight", "mlp.gate.weight")
        .replace("moe.router_bias", "mlp.gate.e_score_correction_bias")
        .replace("moe.down_proj.weight", "mlp.experts.down_proj")
        .replace("share_expert.", "mlp.shared_experts.")
    )


class Reference:
    """transformers' model with given weights, differentiable in the published names.

    Args:
        config: a config.json as a dictionary.
        weights: tensors in the published names.
        dtype: what is computed in; a router's bias stays as it is.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
    ):
        self.config = config
        self.depth = config["num_hidden_layers"]
        self.mtp = config.get("num_nextn_predict_layers", 0)
        self.parameters = {
            name: value.detach()
            .to(torch.float32 if "router_bias" in name else dtype, copy=True)
            .requires_grad_("router_bias" not in name)
            for name, value in weights.items()
        }
        with torch.device("meta"):
            self.model = Step3p7TextModel(config_of_layers(config, 0, self.depth))
        self.model.rotary_emb = Step3p7RotaryEmbedding(self.model.config)
        self.mtp_layers, self.mtp_rotary = [], None
        if self.mtp:
            mtp_config = config_of_layers(config, self.depth, self.mtp)
            with torch.device("meta"):
                self.mtp_layers = [
                    MtpLayer(mtp_config, Step3p7DecoderLayer, Step3p7RMSNorm, k)
                    for k in range(self.mtp)
                ]
            self.mtp_rotary = Step3p7RotaryEmbedding(mtp_config)
            self.mtp_config = mtp_config

    def _layer_weights(self, index: int, prefix: str) -> dict[str, torch.Tensor]:
        start = f"model.layers.{index}."
        own = {
            name.removeprefix(start): value
            for name, value in self.parameters.items()
            if name.startswith(start)
        }
        inner = {}
        for name, value in own.items():
            if name.startswith(("enorm", "hnorm", "eh_proj", "transformer.")):
                continue
            if name == "moe.up_proj.weight":
                continue
            if name == "moe.gate_proj.weight":
                gate_up = torch.cat([value, own["moe.up_proj.weight"]], dim=1)
                inner[f"{prefix}mlp.experts.gate_up_proj"] = gate_up
            else:
                inner[prefix + _reference_name(name)] = value
        if not self.config.get("use_head_wise_attn_gate", True):
            # The reference has no way without a gate: sigmoid(0) = 1/2, so the output counts twice.
            heads = inner[f"{prefix}self_attn.q_proj.weight"].shape[0] // self.config["head_dim"]
            inner[f"{prefix}self_attn.g_proj.weight"] = torch.zeros(
                heads, self.config["hidden_size"]
            )
            o_proj = f"{prefix}self_attn.o_proj.weight"
            inner[o_proj] = 2.0 * inner[o_proj]
        return inner

    def _mtp_weights(self, index: int) -> dict[str, torch.Tensor]:
        start = f"model.layers.{index}."
        own = {
            name: self.parameters[start + name]
            for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight")
        }
        own["post_norm.weight"] = self.parameters[start + "transformer.shared_head.norm.weight"]
        return own | self._layer_weights(index, "mtp_block.")

    def _mtp_head(self, index: int) -> torch.Tensor:
        return self.parameters[f"model.layers.{index}.transformer.shared_head.output.weight"]

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] -> the final normed states [b, s, h]."""
        weights = {
            "embed_tokens.weight": self.parameters["model.embed_tokens.weight"],
            "norm.weight": self.parameters["model.norm.weight"],
        }
        for index in range(self.depth):
            weights |= self._layer_weights(index, f"layers.{index}.")
        output = torch.func.functional_call(
            self.model, weights, (), {"input_ids": input_ids, "use_cache": False}
        )
        return output.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, vocabulary]."""
        return hidden @ self.parameters["lm_head.weight"].T

    def mtp_logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Each MTP layer's logits [b, s, vocabulary], the chain starting from `hidden`."""
        length = input_ids.shape[1]
        positions = torch.arange(length)[None]
        distance = positions[0][:, None] - positions[0][None, :]
        logits = []
        for depth, layer in enumerate(self.mtp_layers):
            index = self.depth + depth
            kind = self.mtp_config.layer_types[depth]
            allowed = distance >= 0
            if kind == SLIDING:
                allowed &= distance < self.config["sliding_window"]
            mask = torch.zeros(length, length).masked_fill(~allowed, float("-inf"))[None, None]
            input_ids = F.pad(input_ids[:, 1:], (0, 1))
            weights = self._mtp_weights(index)
            embeddings = F.embedding(input_ids, self.parameters["model.embed_tokens.weight"])
            rotary = self.mtp_rotary(embeddings, positions, kind)
            hidden = torch.func.functional_call(
                layer, weights, (embeddings, hidden, rotary, mask, positions, None)
            )
            logits.append(hidden @ self._mtp_head(index).T)
        return logits

    def losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Logits, the mean loss, and each MTP layer's over the tokens it predicts."""
        hidden = self.hidden_states(input_ids)
        logits = self.logits(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        mtp_losses = []
        for depth, mtp in enumerate(self.mtp_logits(input_ids, hidden), start=1):
            length = labels.shape[1] - depth
            mtp_losses.append(
                F.cross_entropy(mtp[:, :length].flatten(0, 1), labels[:, depth:].flatten())
            )
        return logits, loss, mtp_losses

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients accumulated so far, in the published names."""
        return {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
