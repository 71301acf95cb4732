"""The oracle for models whose RoPE is each layer's own: transformers' layers, one at a time.

transformers' model has one RoPE for each layer type, and scales that of full attention alone. Its
layers take whatever angles they are given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_layers import MtpLayer
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7DecoderLayer,
    Step3p7RMSNorm,
    Step3p7RotaryEmbedding,
)

from support.reference import SLIDING, Reference, config_of_layers


class LayerwiseReference(Reference):
    """`Reference` of a config that has an entry for each layer in every list."""

    def _config_of(self, index: int) -> Step3p7TextConfig:
        config = config_of_layers(self.config, index, 1)
        kind, scaling = self.config["layer_types"][index], self.config.get("rope_scaling")
        rope = config.rope_parameters[kind]
        plain = {name: rope[name] for name in rope if name not in (scaling or {})}
        scaled = scaling and kind in self.config["yarn_only_types"]
        config.rope_parameters = {kind: plain | (scaling if scaled else {"rope_type": "default"})}
        return config

    def _run(self, index: int, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """One layer: an MTP layer takes the embeddings beside the states, and norms at its end."""
        config = self._config_of(index)
        kind, length = self.config["layer_types"][index], hidden.shape[1]
        positions = torch.arange(length)[None]
        rotary = Step3p7RotaryEmbedding(config)(hidden, positions, kind)
        distance = positions[0][:, None] - positions[0][None, :]
        allowed = distance >= 0
        if kind == SLIDING:
            allowed &= distance < self.config["sliding_window"]
        mask = torch.zeros(length, length).masked_fill(~allowed, float("-inf"))[None, None]
        if index < self.depth:
            with torch.device("meta"):
                layer: Any = Step3p7DecoderLayer(config, 0)
            weights = self._layer_weights(index, "")
            return torch.func.functional_call(
                layer,
                weights,
                (hidden,),
                {
                    "attention_mask": mask,
                    "position_ids": positions,
                    "position_embeddings": rotary,
                },
            )
        with torch.device("meta"):
            layer = MtpLayer(config, Step3p7DecoderLayer, Step3p7RMSNorm, 0)
        weights = self._mtp_weights(index)
        arguments = (embedded, hidden, rotary, mask, positions, None)
        return torch.func.functional_call(layer, weights, arguments)

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] -> the final normed states [b, s, h]."""
        hidden = F.embedding(input_ids, self.parameters["model.embed_tokens.weight"])
        for index in range(self.depth):
            hidden = self._run(index, hidden, hidden)
        with torch.device("meta"):
            norm = Step3p7RMSNorm(self.config["hidden_size"], eps=self.config["rms_norm_eps"])
        weight = {"weight": self.parameters["model.norm.weight"]}
        return torch.func.functional_call(norm, weight, (hidden,))

    def mtp_logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Each MTP layer's logits [b, s, vocabulary], the chain starting from `hidden`."""
        logits = []
        for index in range(self.depth, self.depth + self.mtp):
            input_ids = F.pad(input_ids[:, 1:], (0, 1))
            embedded = F.embedding(input_ids, self.parameters["model.embed_tokens.weight"])
            hidden = self._run(index, embedded, hidden)
            logits.append(hidden @ self._mtp_head(index).T)
        return logits
