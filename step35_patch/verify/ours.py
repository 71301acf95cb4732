"""Our side of a comparison: the GPTModel of Megatron-Core that is trained, called part by part.

Shapes: b sequences, s tokens, h hidden size. Hidden states are [b, s, h] here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from step35_patch.model.live_weights import entries_of
from step35_patch.model.provider import Step35ModelProvider
from step35_patch.tensors.published import Weights
from step35_patch.verify.loading import Embedding, WithoutStorage, load_when_called, own_tensors


class OurSide:
    """The GPTModel of Megatron-Core with this package's layers, called part by part.

    Each part is called once for two inputs, our side's own and the reference's, as two halves of a
    batch, so that its weights are read once.

    Args:
        hf_dir: the config's folder.
        weights: the model's weights.
        tokens: [b, s].
        dtype: what is computed in; the router computes in float32.
        mtp: with the MTP layers.
    """

    def __init__(
        self,
        hf_dir: str | os.PathLike[str],
        weights: Weights,
        tokens: Tensor,
        dtype: torch.dtype,
        *,
        mtp: bool,
    ):
        provider = Step35ModelProvider.from_hf(
            hf_dir,
            transformer_impl="local",
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            **({} if mtp else {"mtp_num_layers": None}),
        )
        with WithoutStorage():
            self._model = provider.provide()
        self._model.eval()
        _connect(self._model, provider, weights)
        self.embedding = Embedding(weights, provider.vocab_size, tokens, dtype)
        twice = torch.cat([tokens, tokens])
        self._mtp_tokens = twice, torch.arange(tokens.shape[1]).expand_as(twice)

    def layer(self, index: int, own: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """A decoder layer's outputs [b, s, h] for two inputs [b, s, h]."""
        layer = self._model.decoder.layers[index]
        output, _ = layer(hidden_states=_join(own, given), attention_mask=None)
        return _split(output)

    def norm(self, own: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """The final norm's outputs [b, s, h] for two inputs [b, s, h]."""
        return _split(self._model.decoder.final_layernorm(_join(own, given)))

    def mtp_layer(self, depth: int, own: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """MTP layer `depth`, called in order, for two normed states [b, s, h]."""
        tokens, positions = self._mtp_tokens
        output, *shifted = self._model.mtp.layers[depth](
            input_ids=tokens,
            position_ids=positions,
            hidden_states=_join(own, given),
            attention_mask=None,
            embedding=lambda input_ids, position_ids: self.embedding(input_ids).transpose(0, 1),
        )
        self._mtp_tokens = shifted[0], shifted[1]
        return _split(output)


def _connect(model: torch.nn.Module, provider: Step35ModelProvider, weights: Weights) -> None:
    """Let every module load what `entries_of` has for it."""
    owners = {
        id(tensor): (module, name)
        for module in model.modules()
        for name, tensor in own_tensors(module)
    }
    loads: dict[torch.nn.Module, dict[str, Callable[[], Tensor]]] = {}
    for entry in entries_of(model, provider.step35):
        module, name = owners[id(entry.parameter)]
        loads.setdefault(module, {})[name] = partial(entry.load, weights)
    for module, by_name in loads.items():
        load_when_called(module, by_name, provider.params_dtype)


def _join(own: Tensor, given: Tensor) -> Tensor:
    """Two [b, s, h] -> Megatron-Core's [s, 2 * b, h]."""
    return torch.cat([own, given]).transpose(0, 1).contiguous()


def _split(output: Tensor) -> tuple[Tensor, Tensor]:
    own, given = output.transpose(0, 1).contiguous().chunk(2)
    return own, given
