"""Experimental, and no public name: Step-3.5 as Megatron-Core's HybridModel. See docs/hybrid.md.

Megatron-Core 0.19 calls GPTModel deprecated. A HybridModel's layers are halves of GPTModel's: its
pattern has a `*` for each attention and a `-` or an `E` for each MLP. Here both halves of a layer
are made of the spec that GPTModel gets, find that layer's plan, and are numbered as it is for
whatever counts layers; Megatron-Core's own number of a half is for its place in a checkpoint alone.

Megatron-Core 0.17 has no HybridModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from step35_patch import settings as process
from step35_patch.config.model import Step35Config
from step35_patch.model import mtp
from step35_patch.model.description import runtime_for
from step35_patch.model.extra_state import mark_norms
from step35_patch.model.layer import Step35DecoderLayer, check_options
from step35_patch.model.norm import Step35RMSNorm
from step35_patch.model.padded_vocabulary import mask_padded_columns
from step35_patch.model.specs import has_experts
from step35_patch.model.split_logits import split_for_losses

_PAIR = (Symbols.ATTENTION + Symbols.MLP, Symbols.ATTENTION + Symbols.MOE)


def hybrid_pattern(
    config: Step35Config, mtp_layers: int | None = None, stages: list[int] | None = None
) -> str:
    """The hybrid_layer_pattern of a config.

    Args:
        config: of the model.
        mtp_layers: how many of its MTP layers, the first ones; all if None.
        stages: how many layers each pipeline stage has, or with a virtual pipeline each chunk in
            the pipeline's order; one stage if None.

    Raises:
        ValueError: the stages' layers are not the config's.
    """
    depth = config.num_hidden_layers
    pairs = [_PAIR[plan.is_moe] for plan in config.layers]
    stages = [depth] if stages is None else stages
    if sum(stages) != depth:
        raise ValueError(f"stages: expected {depth} layers over all, found {stages}")
    decoder = iter(pairs[:depth])
    main = Symbols.PIPE.join("".join(next(decoder) for _ in range(count)) for count in stages)
    last = len(pairs) if mtp_layers is None else depth + mtp_layers
    pattern: str = Symbols.MTP_SEPARATOR.join([main, *pairs[depth:last]])
    return pattern


class Step35HybridLayer(Step35DecoderLayer):
    """One half of a Step-3.5 layer, as HybridStack builds it: its attention, or its MLP.

    Args:
        config: the model's TransformerConfig, as for Step35DecoderLayer.
        submodules: of one half.
        layer_number: HybridStack's: 1-based, by halves.
        mtp_depth: of an MTP layer its 0-based number, which HybridStack does not tell.
        is_mtp_layer: not read: HybridStack of 0.19 says it to attention alone.
        options: as HybridStack passes them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        mtp_depth: int | None = None,
        is_mtp_layer: bool = False,
        **options: Any,
    ):
        whole = (layer_number + 1) // 2 if mtp_depth is None else mtp_depth + 1
        super().__init__(
            config, submodules, layer_number=whole, is_mtp_layer=mtp_depth is not None, **options
        )
        # HybridStack's checkpoint has the halves by it.
        self.layer_number = layer_number

    def _prepare_mlp(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        if not isinstance(self.mlp, IdentityOp):
            super()._prepare_mlp(config, pg_collection)


class Step35HybridStack(HybridStack):
    """HybridStack whose final norm is the spec's; its own is Transformer Engine's always.

    Args:
        config, submodules: as for HybridStack.
        final_norm: builds the norm.
        options: as HybridModel passes them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: Callable[..., torch.nn.Module],
        **options: Any,
    ):
        super().__init__(config, submodules, post_layer_norm=False, **options)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


class Step35HybridMtpLayer(mtp.Step35MultiTokenPredictionLayer):
    """An MTP layer whose halves know which one they are of.

    Args:
        config, submodules: as for Megatron-Core's.
        layer_number: 1-based; on a HybridModel's last stage, which has all MTP layers.
        hybrid_submodules: of all MTP layers alike.
        options: as Megatron-Core's MTP block passes them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int = 1,
        *,
        hybrid_submodules: HybridStackSubmodules,
        **options: Any,
    ):
        def at_depth(half: ModuleSpec) -> ModuleSpec:
            return dataclasses.replace(half, params=half.params | {"mtp_depth": layer_number - 1})

        own = dataclasses.replace(
            hybrid_submodules,
            attention_layer=at_depth(hybrid_submodules.attention_layer),
            mlp_layer=at_depth(hybrid_submodules.mlp_layer),
        )
        super().__init__(
            config, submodules, layer_number=layer_number, hybrid_submodules=own, **options
        )


def _attention_half(layer: ModuleSpec) -> ModuleSpec:
    parts = dataclasses.replace(
        layer.submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
    )
    return ModuleSpec(module=Step35HybridLayer, submodules=parts)


def _mlp_half(layer: ModuleSpec) -> ModuleSpec:
    parts = dataclasses.replace(
        layer.submodules,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
    )
    return ModuleSpec(module=Step35HybridLayer, submodules=parts)


def hybrid_stack_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec:
    """What HybridModel takes in place of Megatron-Core's `hybrid_stack_spec`.

    Made of the specs that GPTModel gets, on either of Megatron-Core's implementations; its own is
    of Transformer Engine's modules, whatever the config says.

    Args:
        config: of a Step-3.5 model; step35_patch is active.
        vp_stage: the model chunk under virtual pipeline parallelism.
    """
    use_te = config.transformer_impl == "transformer_engine"
    # By the module, whose functions the hooks are around.
    layers = gpt_layer_specs.get_gpt_decoder_layer_specs(
        config, use_transformer_engine=use_te, normalization="RMSNorm"
    )
    halves = {has_experts(layer.submodules.mlp): layer for layer in layers}
    mtp_block = None
    if config.mtp_num_layers:
        mtp_block = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, layers[-1], use_te, vp_stage=vp_stage
        )
    if mtp_block is not None:  # on a stage with MTP layers
        parts = mtp_block.layer_specs[0].submodules
        halves[False] = parts.mtp_model_layer
        parts = dataclasses.replace(parts, mtp_model_layer=None)
        mtp_layer = ModuleSpec(module=Step35HybridMtpLayer, submodules=parts)
        mtp_block = dataclasses.replace(mtp_block, layer_specs=[mtp_layer])
    return ModuleSpec(
        module=Step35HybridStack,
        params={"final_norm": TENorm if use_te else Step35RMSNorm},
        submodules=HybridStackSubmodules(
            attention_layer=_attention_half(layers[0]),
            mlp_layer=_mlp_half(halves[False]) if False in halves else IdentityOp,
            moe_layer=_mlp_half(halves[True]) if True in halves else IdentityOp,
            mtp_block_spec=mtp_block,
        ),
    )


class Step35HybridModel(HybridModel):
    """A Step-3.5 model that is a HybridModel: called, loaded, saved and trained as a GPTModel is.

    Args:
        config: of a Step-3.5 model, as for GPTModel: its num_layers counts whole layers.
        vocab_size: rows of the embedding and the output matrices, with what pads them.
        max_sequence_length: as in the Hugging Face config.
        hybrid_layer_pattern: as `hybrid_pattern` makes it, with `|` where pipeline stages meet;
            for one stage if None.
        options: pre_process, post_process, vp_stage and parallel_output of HybridModel.

    Raises:
        ValueError: the config is no Step-3.5 config or step35_patch was deactivated, the pattern is
            another model's, or an option does not go with it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        max_sequence_length: int,
        hybrid_layer_pattern: str | None = None,
        vp_stage: int | None = None,
        **options: Any,
    ):
        runtime = runtime_for(config)
        if runtime is None or not process.enabled():
            raise ValueError(
                "Step35HybridModel: expected a Step-3.5 TransformerConfig with step35_patch "
                "active, found another; make it with Step35ModelProvider"
            )
        check_options(config, runtime)
        pattern = hybrid_layer_pattern or hybrid_pattern(runtime.config, config.mtp_num_layers or 0)
        _check(config, runtime.config, pattern)
        super().__init__(
            config,
            hybrid_stack_spec(config, vp_stage),
            vocab_size,
            max_sequence_length,
            hybrid_layer_pattern=pattern,
            position_embedding_type="none",  # each layer has its own RoPE
            vp_stage=vp_stage,
            **options,
        )
        self.step35 = runtime
        if self.post_process and config.mtp_num_layers:
            mtp.add_output_heads(self)
        mask_padded_columns(self, runtime)
        split_for_losses(self)
        mtp.mark_embedding(self)
        mtp.check_embedding_group(self)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A GPTModel's: by its keys, so that a checkpoint of one is the other's too."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sharded.pop(f"{prefix}output_layer._extra_state", None)  # empty; not on each stage
        names = {"decoder.final_norm.": "decoder.final_layernorm."}
        for layer in self.decoder.layers:
            half = layer.layer_number - 1
            names[f"decoder.layers.{half}."] = f"decoder.layers.{half // 2}."
        for depth in range(self.mtp_num_depths):
            whole = f"mtp.layers.{depth}."
            for half in range(2):
                names[f"{whole}mtp_model_layer.layers.{half}."] = f"{whole}transformer_layer."
        apply_prefix_mapping(sharded, {prefix + old: prefix + new for old, new in names.items()})
        mark_norms(sharded, self.step35.config, prefix)
        return sharded

    def as_gpt_model(self) -> Any:
        """What `step35_patch.model.live_weights` reads, with a GPTModel's names for its modules."""
        return _AsGptModel(self)


def _check(config: TransformerConfig, described: Step35Config, pattern: str) -> None:
    """Raise ValueError for a pattern that is not the model's, and what a HybridModel can't do."""
    lines = []
    expected = hybrid_pattern(described, config.mtp_num_layers or 0)
    stages = pattern.split(Symbols.MTP_SEPARATOR)[0].split(Symbols.PIPE)
    if pattern.replace(Symbols.PIPE, "") != expected or any(len(part) % 2 for part in stages):
        lines.append(
            f"hybrid_layer_pattern: expected {expected!r}, with {Symbols.PIPE!r} between layers, "
            f"found {pattern!r}; make it with hybrid_pattern"
        )
    chunks = config.pipeline_model_parallel_size * (
        config.virtual_pipeline_model_parallel_size or 1
    )
    if len(stages) != chunks:
        lines.append(
            f"hybrid_layer_pattern: expected {chunks} stages, {Symbols.PIPE!r} between them, found "
            f"{len(stages)} in {pattern!r}; give hybrid_pattern the layers of each"
        )
    lines += [
        f"{name}: expected {other!r}, found {getattr(config, name)!r}; {reason}"
        for name, other, reason in (
            ("pipeline_model_parallel_layout", None, "the pattern says where layers are"),
            ("first_last_layers_bf16", False, "Megatron-Core counts a HybridModel's by halves"),
        )
        if getattr(config, name) != other
    ]
    if lines:
        raise ValueError("Step35HybridModel:\n  " + "\n  ".join(lines))


class _AsGptModel:
    """A HybridModel's modules by the names that a GPTModel's have; all else is its own."""

    def __init__(self, model: Step35HybridModel):
        self._model = model
        final_norm = getattr(model.decoder, "final_norm", None)
        self.decoder = SimpleNamespace(
            layers=_whole_layers(model.decoder), final_layernorm=final_norm
        )
        if model.mtp_process:
            self.mtp = SimpleNamespace(
                layers=[_whole_mtp_layer(layer) for layer in model.mtp.layers]
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _whole_layers(stack: HybridStack) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            plan=attention.plan,
            input_layernorm=attention.input_layernorm,
            self_attention=attention.self_attention,
            pre_mlp_layernorm=half.pre_mlp_layernorm,
            mlp=half.mlp,
        )
        for attention, half in zip(stack.layers[::2], stack.layers[1::2], strict=True)
    ]


def _whole_mtp_layer(layer: Any) -> SimpleNamespace:
    (whole,) = _whole_layers(layer.mtp_model_layer)
    return SimpleNamespace(
        enorm=layer.enorm,
        hnorm=layer.hnorm,
        eh_proj=layer.eh_proj,
        final_layernorm=layer.final_layernorm,
        mtp_model_layer=whole,
    )
