"""What stands around Megatron-Core's functions once step35_patch is active.

Each function is a wrapt wrapper, `(wrapped, instance, args, kwargs)`, for the target of the same
name in `step35_patch.patch.targets`. For a TransformerConfig that is no Step-3.5 model each returns
exactly what the wrapped function returns.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from step35_patch import settings as process
from step35_patch.config.comparison import ACCEPTED
from step35_patch.costs import megatron_reports as reports
from step35_patch.model import extra_state, mtp, muon
from step35_patch.model.description import Step35Runtime, check, from_settings, runtime_for
from step35_patch.model.generation import DYNAMIC_CONTEXT
from step35_patch.model.layer import check_options
from step35_patch.model.padded_vocabulary import mask_padded_columns
from step35_patch.model.specs import decoder_layer_spec, mtp_layer_spec, step35_norm
from step35_patch.model.split_logits import split_for_losses
from step35_patch.patch import packed_data
from step35_patch.patch.agreement import (
    HERE_IN_BRIDGE,
    check_checkpoint,
    check_implementation,
    check_mtp_layers,
    check_ranks_agree,
    recorded_by_bridge,
)
from step35_patch.patch.built_model import announce, check_model, refuse_other_kind
from step35_patch.patch.notices import warn
from step35_patch.patch.parse_args import parse

# What wrapt hands over (`step35_patch.patch.targets.Hook`).
Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _bind(wrapped: Wrapped, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """The call's arguments by name, defaults left out."""
    return inspect.signature(wrapped).bind(*args, **kwargs).arguments


def get_gpt_decoder_layer_specs(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Specs of all decoder layers: list[ModuleSpec], by layer."""
    specs = wrapped(*args, **kwargs)
    runtime = runtime_for(_bind(wrapped, args, kwargs)["config"])
    if runtime is None:
        return specs
    return [decoder_layer_spec(spec, runtime) for spec in specs]


def get_gpt_decoder_block_spec(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Specs of this pipeline stage's decoder layers and the final norm."""
    block = wrapped(*args, **kwargs)
    runtime = runtime_for(_bind(wrapped, args, kwargs)["config"])
    return block if runtime is None else _block(block, runtime)


def _block(block: Any, runtime: Step35Runtime) -> Any:
    return dataclasses.replace(
        block,
        layer_specs=[decoder_layer_spec(spec, runtime) for spec in block.layer_specs],
        layer_norm=step35_norm(block.layer_norm),
    )


def get_gpt_mtp_block_spec_for_backend(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Specs of the MTP layers, or None on a stage without them.

    The spec that comes in (the last decoder layer's, here MoE; or a stock one when the last stage
    has no decoder layer) is not what the MTP layers are, so it is not used: they are dense.
    """
    call = _bind(wrapped, args, kwargs)
    config = call["config"]
    runtime = runtime_for(config)
    if runtime is None:
        return wrapped(*args, **kwargs)
    dense_config = copy.copy(config)
    dense_config.step35 = runtime
    dense_config.moe_layer_freq = [0] * config.num_layers
    dense = gpt_layer_specs.get_gpt_decoder_layer_specs(
        dense_config,
        # True of Transformer Engine's spec provider, and of no local one.
        use_transformer_engine=call["backend"].fuse_layernorm_and_linear(),
        normalization=config.normalization,
    )[0]
    # The builder accepts a spec only if its module is exactly TransformerLayer.
    call["spec"] = dataclasses.replace(dense, module=TransformerLayer)
    block = wrapped(**call)
    if block is None:
        return None
    return dataclasses.replace(
        block, layer_specs=[mtp_layer_spec(spec, dense) for spec in block.layer_specs]
    )


def gpt_model_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """GPTModel.__init__: what it builds is a Step-3.5 model, which is then checked.

    Specs of whatever origin become Step-3.5's, the MTP layers get their output matrices, and
    columns that only pad the vocabulary are masked.
    """
    call = _bind(wrapped, args, kwargs)
    runtime = runtime_for(call["config"])
    if runtime is None:
        wrapped(*args, **kwargs)
        return
    check_options(call["config"], runtime)  # by each layer too, but a stage may have none
    _check_model_arguments(call, runtime)
    call["transformer_layer_spec"] = _layer_specs(call, runtime)
    # Each layer has its own RoPE: the model-wide table would be made and never be used.
    call["position_embedding_type"] = "none"
    wrapped(**call)
    # What it is, whatever becomes of the config that it was built from.
    instance.step35 = runtime
    if instance.post_process and instance.config.mtp_num_layers:
        mtp.add_output_heads(instance)
    mask_padded_columns(instance, runtime)
    split_for_losses(instance)
    mtp.mark_embedding(instance)
    mtp.check_embedding_group(instance)
    check_model(instance, runtime)
    announce(runtime, instance.config, instance.vocab_size)


def language_module_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """LanguageModule.__init__, of GPTModel and of the models whose layers are not exchanged."""
    refuse_other_kind(instance, _bind(wrapped, args, kwargs)["config"])
    wrapped(*args, **kwargs)


def llava_model_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """LLaVAModel.__init__: a language model among a vision model's layers."""
    refuse_other_kind(instance, _bind(wrapped, args, kwargs)["language_transformer_config"])
    wrapped(*args, **kwargs)


def is_inference_column_parallel_linear(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Without Transformer Engine there are no such layers; Megatron-Core's `isinstance` fails."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    return wrapped(*args, **kwargs)


def gpt_model_sharded_state_dict(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """GPTModel.sharded_state_dict: what a checkpoint may lack is marked for `load_sharded`."""
    sharded = wrapped(*args, **kwargs)
    runtime: Step35Runtime | None = getattr(instance, "step35", None)
    if runtime is not None:
        prefix = _bind(wrapped, args, kwargs).get("prefix", "")
        extra_state.mark_norms(sharded, runtime.config, prefix)
    return sharded


def load_sharded(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """dist_checkpointing.load: of a checkpoint that another implementation saved, too."""
    call = _bind(wrapped, args, kwargs)
    call["sharded_state_dict"] = extra_state.without_absent(
        call["sharded_state_dict"], call["checkpoint_dir"], call.get("sharded_strategy")
    )
    return wrapped(**call)


def _layer_specs(call: dict[str, Any], runtime: Step35Runtime) -> Any:
    """The decoder's specs from GPTModel's `transformer_layer_spec`.

    A single layer's spec, such as the single-layer builders return, stands for all layers alike;
    Step-3.5's differ, so that the block's builder is asked instead.
    """
    spec = call["transformer_layer_spec"]
    if not isinstance(spec, ModuleSpec):
        return _block(spec, runtime)
    core_attention = spec.submodules.self_attention.submodules.core_attention
    config = call["config"]
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=core_attention is not DotProductAttention,
        normalization=config.normalization,
        vp_stage=call.get("vp_stage"),
    )


def _check_model_arguments(call: dict[str, Any], runtime: Step35Runtime) -> None:
    config = runtime.config
    expected = {
        "vocab_size": (lambda found: found >= config.vocab_size, f"at least {config.vocab_size}"),
        "share_embeddings_and_output_weights": (lambda found: not found, "False"),
        "position_embedding_type": (lambda found: found in ("rope", "none"), "'rope'"),
        "rope_scaling": (lambda found: not found, "False: the Step-3.5 config decides the scaling"),
        "seq_len_interpolation_factor": (lambda found: found is None, "None"),
    }
    lines = [
        f"{name}: expected {text}, found {call[name]!r}"
        for name, (legal, text) in expected.items()
        if name in call and not legal(call[name])
    ]
    if lines:
        raise ValueError("GPTModel of Step-3.5:\n  " + "\n  ".join(lines))


def dynamic_context_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """DynamicInferenceContext.__init__: refused before its cache is made.

    StaticInferenceEngine tries one, and uses its static context where that fails.
    """
    if runtime_for(_bind(wrapped, args, kwargs)["model_config"]) is not None:
        raise NotImplementedError(DYNAMIC_CONTEXT)
    wrapped(*args, **kwargs)


def process_mtp_loss(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The MTP losses, each from its own output matrix, as means over the tokens of all ranks."""
    call = _bind(wrapped, args, kwargs)
    output_layer = call["output_layer"]
    if not mtp.has_output_heads(output_layer) and runtime_for(call["config"]) is None:
        return wrapped(*args, **kwargs)
    call["output_layer"] = mtp.by_depth(output_layer)
    mtp.make_room_in_the_log(call["config"])
    call["runtime_gather_output"] = False  # nobody sees these logits but the loss
    if "packed_seq_params" in call:
        call["packed_seq_params"] = mtp.by_slots(call["packed_seq_params"])
    mtp.share_of_the_tokens(call)
    return wrapped(**call)


def get_megatron_optimizer(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The optimizer of a model's chunks; Muon takes the published matrices one at a time."""
    call = _bind(wrapped, args, kwargs)
    chunks = muon.step35_chunks(call["model_chunks"])
    if chunks:
        muon.check_optimizer(call["config"])
    optimizer = wrapped(*args, **kwargs)
    muon.by_published_matrix(optimizer, chunks)
    return optimizer


def get_megatron_muon_optimizer(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The same of 0.17's; that of later releases hands everything on to the other one."""
    if "model_chunks" in inspect.signature(wrapped).parameters:
        return get_megatron_optimizer(wrapped, instance, args, kwargs)
    return wrapped(*args, **kwargs)


def get_megatron_optimizer_config(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Megatron's (OptimizerConfig, overrides for some parameters) for its arguments."""
    config, overrides = wrapped(*args, **kwargs)
    if not getattr(_bind(wrapped, args, kwargs)["args"], "step35_decay_1d", None):
        return config, overrides
    kept = {key: own for key, own in overrides.items() if own.get("wd_mult") != 0.0}
    if len(kept) == len(overrides):
        raise RuntimeError(
            "--step35-decay-1d: expected Megatron-Core to leave parameters of one dimension out of "
            f"the weight decay (wd_mult 0), found the overrides {overrides}"
        )
    return config, kept


def parse_args(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Megatron's arguments, with the package's own and the model's shape."""
    return parse(wrapped, _bind(wrapped, args, kwargs))


def initialize_megatron(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Megatron's start, at whose end the ranks know each other and nothing is built yet."""
    result = wrapped(*args, **kwargs)
    check_ranks_agree(process.active())
    return result


def load_base_checkpoint(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """A checkpoint's state; first of all, before any tensor, its arguments are read here."""
    result = wrapped(*args, **kwargs)
    state, name = result[0], result[1]
    if state is not None and state.get("args") is not None:
        own = _bind(wrapped, args, kwargs)["args"]
        check_checkpoint(
            state["args"], str(name), process.active(), getattr(own, ACCEPTED, None) or ()
        )
        check_mtp_layers(state["args"], own, str(name))
        check_implementation(state, own, str(name))
    return result


def _reported(wrapped: Wrapped, args: Args, kwargs: Kwargs, report: Callable[..., Any]) -> Any:
    """Megatron's number, or for a run of a Step-3.5 model that of `report`."""
    settings = process.active()
    if settings is None:
        return wrapped(*args, **kwargs)
    return report(from_settings(settings), **_bind(wrapped, args, kwargs))


def num_floating_point_operations(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Operations of a batch, from which Megatron prints TFLOP/s."""
    return _reported(wrapped, args, kwargs, reports.num_floating_point_operations)


def moe_metrics(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The logged balancing and z losses, as means over the MoE layers."""
    settings = process.active()
    if settings is None:
        return wrapped(*args, **kwargs)
    call = _bind(wrapped, args, kwargs)
    reports.leave_mtp_layers_out(call)
    return wrapped(**call)


def compute_weight_and_optimizer_memory(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """The first part of Megatron's theoretical memory report."""
    return _reported(wrapped, args, kwargs, reports.compute_weight_and_optimizer_memory)


def compute_activation_memory(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The second part of it."""
    return _reported(wrapped, args, kwargs, reports.compute_activation_memory)


def compute_activation_memory_without_sp(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """The same: Megatron also calls it for runs with sequence parallelism."""
    return _reported(wrapped, args, kwargs, reports.compute_activation_memory)


def sft_sample(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """SFTDataset.__getitem__: a pack of documents, none of which predicts the next one's start."""
    if not packed_data.is_step35(instance.config):
        return wrapped(*args, **kwargs)
    tokenizer = instance.config.tokenizer
    packed_data.check_padding(tokenizer.pad, tokenizer.eod)
    sample = wrapped(*args, **kwargs)
    packed_data.leave_out_ends(sample)
    return sample


def sft_tokenizer_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """SFTTokenizer.__init__: 0.17 takes a chat template's tokens as transformers 4 returns them."""
    wrapped(*args, **kwargs)
    if process.active() is not None and not hasattr(instance, "_extract_token_ids"):
        tokenizer = instance._tokenizer
        tokenizer.apply_chat_template = functools.partial(
            tokenizer.apply_chat_template, return_dict=False
        )


def gpt_sample(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """GPTDataset.__getitem__: documents that context parallelism can deal out one by one."""
    sample = wrapped(*args, **kwargs)
    if not packed_data.is_step35(instance.config) or "cu_seqlens" not in sample:
        return sample
    ranks = instance.config.context_parallel_size
    if ranks is None or ranks == 1:
        return sample
    packed_data.say_slots(2 * ranks)
    return packed_data.in_slots(sample, 2 * ranks)


def dataset_builder_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """BlendedMegatronDatasetBuilder.__init__: a stage between reads where documents begin, too."""
    call = _bind(wrapped, args, kwargs)
    if process.active() is not None:
        packed_data.mark(call["config"])
        if getattr(call["config"], "inter_document_masking", False):
            call["is_built_on_rank"] = packed_data.is_built_on_rank
    wrapped(**call)


def get_batch_on_this_tp_rank(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """A batch that the first tensor-parallel rank has read, with the documents' bounds."""
    batch = wrapped(*args, **kwargs)
    if process.active() is not None:
        packed_data.share_bounds(batch)
    return batch


def get_batch_on_this_cp_rank(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """A context-parallel rank's part of a batch; of packed documents without Transformer Engine."""
    if process.active() is None:
        return wrapped(*args, **kwargs)
    call = _bind(wrapped, args, kwargs)
    if call["batch"].get("cu_seqlens") is not None and "use_per_sequence_balancing" in call:
        # Megatron would cut across documents, as no attention on packed documents expects it.
        call["use_per_sequence_balancing"] = False
    with packed_data.index_function():
        return wrapped(**call)


def get_thd_batch_on_this_cp_rank(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """The same of packed documents, in 0.17."""
    if process.active() is None:
        return wrapped(*args, **kwargs)
    return packed_data.deal(wrapped, _bind(wrapped, args, kwargs))


def core_transformer_config_from_args(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """The TransformerConfig of Megatron's arguments, which have to describe the active config."""
    config = wrapped(*args, **kwargs)
    settings = process.active()
    if settings is not None:
        check(config, settings.config, settings.source)
        config.step35 = from_settings(settings)
        # Layers differ in shape: they must not be stacked into one tensor of the checkpoint.
        config.hetereogenous_dist_checkpoint = True
    return config


def bridge_initialize_megatron(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Megatron-Bridge's: the copies of the embedding as the layout has them, and ranks agree."""
    call = _bind(wrapped, args, kwargs)
    provider = call["cfg"].model
    runtime = runtime_for(provider)
    if runtime is None:
        return wrapped(*args, **kwargs)
    call.setdefault("get_embedding_ranks", functools.partial(_embedding_ranks, provider))
    result = wrapped(**call)
    check_ranks_agree(_settings_of(runtime))
    return result


def _embedding_ranks(provider: Any, pp_ranks: list[int], *_: Any) -> list[int]:
    return mtp.embedding_ranks(pp_ranks, provider)


def _settings_of(runtime: Step35Runtime) -> process.Settings:
    return process.Settings(
        runtime.config, runtime.gate_layout, runtime.window, runtime.padded_logits, "the provider's"
    )


def bridge_load_base_checkpoint(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Megatron-Bridge's: a checkpoint of another model is refused before tensors are read."""
    loaded = wrapped(*args, **kwargs)
    call = _bind(wrapped, args, kwargs)
    state, name, *_ = loaded
    runtime = runtime_for(call["cfg"].model) if call.get("rank0") and call.get("cfg") else None
    if runtime is not None and state is not None:
        accept = getattr(call["cfg"].model, "accept_changed", ())
        saved = recorded_by_bridge(str(name)) or state.get("args")
        check_checkpoint(saved, str(name), _settings_of(runtime), accept, HERE_IN_BRIDGE)
    return loaded


def bridge_save_hf_adapter(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Megatron-Bridge's: refused for this package's model, which has a function of its own."""
    if type(instance._model_bridge).__module__.startswith("step35_patch."):
        raise NotImplementedError(
            "save_hf_adapter: PEFT would not find most of the adapters' modules in transformers' "
            "Step-3.5, and unpacks routed experts otherwise; call "
            "step35_patch.bridge.save_adapters(bridge, model, path, peft)"
        )
    return wrapped(*args, **kwargs)


def bridges_own_provider(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Megatron-Bridge's own provider of Step-3.5: with a warning where it can't be right."""
    if "head_wise_attn_gate" not in TransformerConfig.__dataclass_fields__:
        _warn_of_bridges_own_model()
    return wrapped(*args, **kwargs)


@functools.cache
def _warn_of_bridges_own_model() -> None:
    warn(
        "Megatron-Bridge makes its own Step-3.5 model here, and this Megatron-Core lacks what it "
        "relies on (TransformerConfig.head_wise_attn_gate): it would load and train without an "
        "error, and compute something else. Write `import step35_patch.bridge` before it, or set "
        "STEP35_CONFIG to the model's folder."
    )
