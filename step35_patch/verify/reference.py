"""The two sides of `step35_patch.verify.api`, one module's weights of each in memory at a time.

Both sides are built without storage. The reference is a layer of transformers' Step3p7, made anew for
each index; ours is the GPTModel that `Step35ModelProvider` builds for training. A module gets
its weights when it is called (`_load_when_called`).

Shapes: b sequences, s tokens, h hidden size. Hidden states are [b, s, h] here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
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
from step35_patch.model.live_weights import entries_of
from step35_patch.model.provider import Step35ModelProvider
from step35_patch.storage.hf_folder import HfFolder
from step35_patch.verify.api import VOCABULARY_ROWS, Weights

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def vocabulary_blocks(size: int) -> Iterator[slice]:
    """The rows of the vocabulary that are read at a time."""
    for start in range(0, size, VOCABULARY_ROWS):
        yield slice(start, min(start + VOCABULARY_ROWS, size))


# --- Modules without storage --------------------------------------------------------------------


class _WithoutStorage(TorchFunctionMode):
    """Parameters and buffers are made on the meta device, whatever device they are asked for on.

    torch.device("meta") does not do this where `step35_patch.cpu` stands around torch's functions,
    and not for those that name a device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("empty", "ones", "zeros"):
            kwargs |= {"device": "meta"}
        return func(*args, **kwargs)


def _load_when_called(
    module: torch.nn.Module, loads: dict[str, Callable[[], Tensor]], dtype: torch.dtype
) -> None:
    """Give a module its parameters and buffers for the time of each call, and no longer.

    Args:
        loads: reads each of them, by its name in the module.
        dtype: of the parameters; buffers (the router's bias) keep what they are loaded in.
    """
    empty = {name: getattr(module, name) for name in loads}

    def before(module: torch.nn.Module, args: Any) -> None:
        for name, load in loads.items():
            value = load()
            if isinstance(empty[name], torch.nn.Parameter):
                value = torch.nn.Parameter(value.to(dtype), requires_grad=False)
            setattr(module, name, value)

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        for name, value in empty.items():
            setattr(module, name, value)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers, without those of its submodules."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


class _Embedding:
    """The rows of the embedding that a few tokens need.

    Args:
        weights: read by blocks of the vocabulary.
        tokens: [b, s], all that will be asked for; token 0 besides, which stands behind the end of
            a sequence for the MTP layers.
    """

    def __init__(self, weights: Weights, config: Step35Config, tokens: Tensor, dtype: torch.dtype):
        self._ids = torch.cat([tokens.flatten(), tokens.new_zeros(1)]).unique()
        rows = []
        for block in vocabulary_blocks(config.vocab_size):
            own = self._ids[(self._ids >= block.start) & (self._ids < block.stop)]
            if own.numel():
                rows.append(weights.get(EMBEDDING, block)[own - block.start].to(dtype))
        self._rows = torch.cat(rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]."""
        return F.embedding(torch.searchsorted(self._ids, tokens), self._rows)


# --- The reference ------------------------------------------------------------------------------


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


class ReferenceSide:
    """transformers' Step3p7, layer by layer.

    Args:
        folder: its weights.
        tokens: [b, s].
    """

    def __init__(self, config: Step35Config, folder: HfFolder, tokens: Tensor, dtype: torch.dtype):
        self._config, self._folder, self._dtype = config, folder, dtype
        self.embedding = _Embedding(folder, config, tokens, dtype)
        self._mtp_tokens = tokens
        self._decoder = _reference_config(config.to_dict())
        self._mtp = _reference_config(_mtp_document(config))

    def layer(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """A decoder layer: [b, s, h] -> [b, s, h], and for MoE the gap [b * s] between the scores
        of the last expert that was chosen and of the next one."""
        with _WithoutStorage():
            layer = Step3p7DecoderLayer(self._decoder, index)
        self._connect(layer, "", self._config.layers[index])
        gaps = []
        if self._config.layers[index].is_moe:
            bias = self._folder.get(f"model.layers.{index}.moe.router_bias")
            layer.mlp.gate.register_forward_hook(
                lambda module, args, output: gaps.append(self._gap(output[0], bias))
            )
        output = layer(hidden, **self._attention(self._decoder, index, hidden))
        return output, gaps[0] if gaps else None

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm: [b, s, h] -> [b, s, h]."""
        with _WithoutStorage():
            norm = Step3p7RMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        self._connect_leaf(norm, {"weight": functools.partial(self._folder.get, NORM)})
        return norm(hidden)

    def mtp_layer(self, depth: int, hidden: Tensor) -> Tensor:
        """MTP layer `depth`, called in order: the normed states [b, s, h] before it and after it."""
        self._mtp_tokens = F.pad(self._mtp_tokens[:, 1:], (0, 1))
        with _WithoutStorage():
            layer = MtpLayer(self._mtp, Step3p7DecoderLayer, Step3p7RMSNorm, depth)
        self._connect(
            layer, "mtp_block.", self._config.layers[self._config.num_hidden_layers + depth]
        )
        attention = self._attention(self._mtp, depth, hidden)
        return layer(self.embedding(self._mtp_tokens), hidden, past_key_values=None, **attention)

    def _attention(self, config: Step3p7TextConfig, index: int, hidden: Tensor) -> dict[str, Any]:
        """What the model computes once and hands to each layer of a kind."""
        kind = config.layer_types[index]
        positions = torch.arange(hidden.shape[1])[None]
        make_mask = (
            create_causal_mask if kind == FULL_ATTENTION else create_sliding_window_causal_mask
        )
        return {
            "attention_mask": make_mask(
                config=config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            ),
            "position_embeddings": Step3p7RotaryEmbedding(config)(hidden, positions, kind),
            "position_ids": positions,
        }

    def _gap(self, logits: Tensor, bias: Tensor) -> Tensor:
        scores = torch.sigmoid(logits.float()) + bias
        chosen = self._config.moe_top_k
        if chosen == scores.shape[-1]:
            return torch.full_like(scores[:, 0], torch.inf)
        best = scores.topk(chosen + 1).values
        return best[:, -2] - best[:, -1]

    def _connect(self, module: torch.nn.Module, layer: str, plan: LayerPlan) -> None:
        """Let the modules of a layer load their published tensors.

        Args:
            layer: prefix of the decoder layer's modules in `module`.
        """
        module.eval()
        prefix = f"model.layers.{plan.index}."
        for path, leaf in module.named_modules():
            names = [name for name, _ in _own_tensors(leaf)]
            inner = path.removeprefix(layer)
            if inner == "mlp.experts":
                self._connect_experts(leaf, prefix + "moe.")
            elif names:
                loads = {name: self._load(prefix, f"{inner}.{name}", plan) for name in names}
                self._connect_leaf(leaf, loads, exact=inner == "mlp.gate")

    def _connect_leaf(
        self, module: torch.nn.Module, loads: dict[str, Callable[[], Tensor]], exact: bool = False
    ) -> None:
        # Of a router in float32 the logits are float32 too (`need_fp32_gate`).
        _load_when_called(module, loads, torch.float32 if exact else self._dtype)

    def _load(self, prefix: str, name: str, plan: LayerPlan) -> Callable[[], Tensor]:
        """Reads what transformers calls `name`, within the layer."""
        published = prefix + (
            name.replace("mlp.gate.weight", "moe.gate.weight")
            .replace("mlp.gate.e_score_correction_bias", "moe.router_bias")
            .replace("mlp.shared_experts.", "share_expert.")
            .replace("post_norm.weight", "transformer.shared_head.norm.weight")
        )
        if not self._config.use_head_wise_attn_gate:
            # The reference has no way without a gate: sigmoid(0) = 1/2, so its output counts twice.
            if name == "self_attn.g_proj.weight":
                shape = plan.num_attention_heads, self._config.hidden_size
                return functools.partial(torch.zeros, shape)
            if name == "self_attn.o_proj.weight":
                return lambda: 2 * self._folder.get(published)
        return functools.partial(self._folder.get, published)

    def _connect_experts(self, experts: torch.nn.Module, prefix: str) -> None:
        def gate_up(expert: int) -> Tensor:
            names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
            return torch.cat([self._folder.get(name, expert) for name in names]).to(self._dtype)

        def down(expert: int) -> Tensor:
            return self._folder.get(f"{prefix}down_proj.weight", expert).to(self._dtype)

        for name, load in {"gate_up_proj": gate_up, "down_proj": down}.items():
            delattr(experts, name)
            setattr(experts, name, _ExpertWeights(load))


# --- Ours ---------------------------------------------------------------------------------------


class OurSide:
    """The GPTModel of Megatron-Core with this package's layers, called part by part.

    Each part is called once for two inputs, our side's own and the reference's, as two halves of a
    batch, so that its weights are read once.

    Args:
        source: its weights.
        tokens: [b, s].
    """

    def __init__(
        self,
        hf_dir: str | os.PathLike,
        source: Weights,
        tokens: Tensor,
        dtype: torch.dtype,
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
        with _WithoutStorage():
            self._model = provider.provide()
        self._model.eval()
        self._connect(source, provider)
        self.embedding = _Embedding(source, provider.hf_config, tokens, dtype)
        twice = torch.cat([tokens, tokens])
        self._mtp_tokens = twice, torch.arange(tokens.shape[1]).expand_as(twice)

    def _connect(self, source: Weights, provider: Step35ModelProvider) -> None:
        """Let every module load what the map of `step35_patch.checkpoint` has for it."""
        owners = {
            id(tensor): (module, name)
            for module in self._model.modules()
            for name, tensor in _own_tensors(module)
        }
        loads: dict[torch.nn.Module, dict[str, Callable[[], Tensor]]] = {}
        for entry in entries_of(self._model, provider.step35):
            module, name = owners[id(entry.parameter)]
            loads.setdefault(module, {})[name] = functools.partial(entry.load, source)
        for module, by_name in loads.items():
            _load_when_called(module, by_name, provider.params_dtype)

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


def _join(own: Tensor, given: Tensor) -> Tensor:
    """Two [b, s, h] -> Megatron-Core's [s, 2 * b, h]."""
    return torch.cat([own, given]).transpose(0, 1).contiguous()


def _split(output: Tensor) -> tuple[Tensor, Tensor]:
    own, given = output.transpose(0, 1).contiguous().chunk(2)
    return own, given
