"""A launch in a size for this machine: fewer and smaller layers, fewer ranks, the same arguments.

`plan` says what is started in place of a launch, and what is otherwise than in it. What is not
about size, data, checkpoints or a GPU's kernels stays as the user wrote it.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from step35_patch.config.model import Step35Config
from step35_patch.costs.launch import Launch, LaunchError, Stage, fewest_ranks, stages
from step35_patch.launch.parsing import argument_groups, megatron_parser
from step35_patch.launch.shrinking import length_for, shrunk, with_layers
from step35_patch.launch.values import unknowns

# Iterations until the checkpoint, and until the end of the run that resumes from it.
SAVED_AT, ITERATIONS = 3, 5
_MOST_LAYERS_OF_A_STAGE, _MOST_MTP_LAYERS = 2, 2

# What is replaced by the plan's own, or of no use in it, by Megatron's names.
_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "padded_vocab_size"),
    *("pipeline_model_parallel_layout", "num_virtual_stages_per_pipeline_rank"),
    *("num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split"),
    *("account_for_loss_in_pipeline_split", "microbatch_group_size_per_vp_stage", "cp_comm_type"),
    *("seq_length", "max_position_embeddings", "micro_batch_size", "global_batch_size"),
    *("rampup_batch_size", "step_batch_size_schedule", "recompute_num_layers", "mtp_num_layers"),
    *("hierarchical_context_parallel_sizes", "sequence_parallel", "num_layers", "vocab_size"),
    *("make_vocab_size_divisible_by", "moe_layer_freq", "step35_config", "hidden_size"),
    *("num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "num_experts"),
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk"),
)
_SCHEDULE = (
    *("train_iters", "train_samples", "exit_interval", "exit_duration_in_mins", "lr_decay_iters"),
    *("lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_samples", "eval_iters", "eval_interval", "log_interval"),
    *("phase_transition_iterations", "full_validation"),
)
_CHECKPOINTS = (
    *("load", "save", "save_interval", "save_retain_interval", "pretrained_checkpoint", "finetune"),
    *("ckpt_step", "exit_on_missing_checkpoint", "no_load_optim", "no_load_rng", "async_save"),
    *("non_persistent_save_interval", "non_persistent_ckpt_type", "non_persistent_local_ckpt_dir"),
    *("use_checkpoint_args", "use_checkpoint_opt_param_scheduler", "no_save_optim", "no_save_rng"),
    *("override_opt_param_scheduler", "step35_accept_changed"),
    *("use_persistent_ckpt_worker", "ckpt_fully_parallel_load"),
)
_DATA = (
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path"),
    *("per_split_data_args_path", "split", "mock_data", "data_cache_path", "num_workers"),
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "tokenizer_metadata"),
    *("tokenizer_hf_include_special_tokens", "tiktoken_pattern", "special_tokens", "sft"),
    *("tiktoken_num_special_tokens", "tiktoken_special_tokens", "sft_tokenizer_prompt_format"),
    "dataloader_type",
)
_LOGS = ("tensorboard_", "wandb_", "one_logger", "log_straggler", "profile", "enable_ft")
_KERNELS = (
    *("transformer_impl", "moe_grouped_gemm", "moe_router_fusion", "moe_permute_fusion"),
    *("use_flash_attn", "attention_backend", "cross_entropy_loss_fusion", "distributed_backend"),
    *("cross_entropy_fusion_impl", "use_precision_aware_optimizer", "moe_enable_deepep"),
    *("main_params_dtype", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "nccl_ub"),
    *("delay_wgrad_compute", "overlap_moe_expert_parallel_comm", "moe_flex_dispatcher_backend"),
    *("moe_token_dispatcher_type", "use_sharp", "apply_rope_fusion", "bias_swiglu_fusion"),
    *("moe_shared_expert_overlap", "create_attention_mask_in_dataloader", "fine_grained_"),
)
_KERNEL_PREFIXES = (
    "fp8",
    "fp4",
    "tp_comm",
    "cuda_graph",
    "nccl_",
    "inference_",
    "te_",
    "first_last_",
)


@dataclass(frozen=True)
class Plan:
    """What is started in place of a launch.

    Attributes:
        arguments: of the training program, without checkpoints.
        processes: how many.
        config: the model's config.json.
        changes: what is otherwise than in the launch, a line each.
        stages: which of the launch's layers each stage has the kind of.
        resume: further arguments of the run that resumes.
    """

    arguments: list[str]
    processes: int
    config: dict[str, Any]
    changes: list[str]
    stages: list[Stage]
    resume: list[str]


def plan(config: Step35Config, launch: Launch, arguments: Sequence[str], processes: int) -> Plan:
    """Shrink a launch.

    Args:
        config: its model.
        launch: how it is laid out.
        arguments: of its training program.
        processes: how many this machine can start, at most.

    Raises:
        LaunchError: its layers cannot be divided.
    """
    small = _fewer_ranks(launch, processes)
    chosen = list(_chosen_stages(config, launch, small))
    decoder = [index for stage in chosen for index in stage.decoder_layers]
    mtp = sum(len(stage.mtp_layers) for stage in chosen)
    small = _laid_out(
        dataclasses.replace(small, num_layers=len(decoder), mtp_num_layers=mtp), chosen
    )
    length = length_for(
        tensor=small.tensor_model_parallel_size, context=small.context_parallel_size
    )
    document = shrunk(
        with_layers(config, decoder, mtp),
        tensor=small.tensor_model_parallel_size,
        expert=small.expert_model_parallel_size,
        length=length,
    )
    micro = min(launch.micro_batch_size, 2)
    count = 2 * max(small.pipeline_model_parallel_size, 1)
    words, dropped, data = _kept(arguments)
    if data:
        document["vocab_size"] = config.vocab_size
    own = [
        *_layout_words(small),
        *("--seq-length", str(length), "--micro-batch-size", str(micro)),
        *("--global-batch-size", str(micro * small.data_parallel_size * count)),
        *("--train-iters", str(ITERATIONS), "--lr-decay-iters", str(ITERATIONS)),
        *("--eval-iters", "0", "--eval-interval", "1000", "--log-interval", "1"),
        *("--num-workers", "0", "--moe-token-dispatcher-type", "alltoall"),
        "--no-create-attention-mask-in-dataloader",
    ]
    if not data:
        own += ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255"]
    if launch.recompute_granularity == "full":
        own += ["--recompute-num-layers", "1"]
    return Plan(
        [*words, *own],
        small.world_size,
        document,
        list(_changes(config, launch, small, length, dropped, data=data)),
        chosen,
        ["--no-load-optim"] if _loads_no_optimizer(launch) else [],
    )


def _loads_no_optimizer(launch: Launch) -> bool:
    """Whether Megatron-Core's distributed optimizer is torch's here, of which it loads no state.

    Its `state_dict` asks for the step of a state that is only made by the first one.
    """
    fused = ("transformer_engine", "apex")
    return launch.use_distributed_optimizer and not any(map(importlib.util.find_spec, fused))


def _fewer_ranks(launch: Launch, most: int) -> Launch:
    """Parallel sizes of at most 2, as many of them as the processes allow."""
    names = (
        "pipeline_model_parallel_size",
        "tensor_model_parallel_size",
        "expert_model_parallel_size",
        "context_parallel_size",
        "expert_tensor_parallel_size",
    )
    sizes = dict.fromkeys(names, 1)
    for name in names:
        wider = sizes | {name: min(getattr(launch, name), 2)}
        if _world(wider) <= most:
            sizes = wider
    world = _world(sizes)
    if launch.data_parallel_size > 1 and 2 * world <= most:
        world *= 2
    virtual = launch.virtual_pipeline_model_parallel_size
    tensor = sizes["tensor_model_parallel_size"]
    return dataclasses.replace(
        launch,
        pipeline_model_parallel_size=sizes["pipeline_model_parallel_size"],
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=sizes["expert_model_parallel_size"],
        context_parallel_size=sizes["context_parallel_size"],
        expert_tensor_parallel_size=sizes["expert_tensor_parallel_size"],
        world_size=world,
        sequence_parallel=launch.sequence_parallel and tensor > 1,
        virtual_pipeline_model_parallel_size=min(virtual, 2)
        if virtual and sizes["pipeline_model_parallel_size"] > 1
        else None,
        pipeline_model_parallel_layout=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )


def _world(sizes: dict[str, int]) -> int:
    return fewest_ranks(
        tensor=sizes["tensor_model_parallel_size"],
        pipeline=sizes["pipeline_model_parallel_size"],
        context=sizes["context_parallel_size"],
        expert=sizes["expert_model_parallel_size"],
        expert_tensor=sizes["expert_tensor_parallel_size"],
    )


def _chosen_stages(config: Step35Config, launch: Launch, small: Launch) -> Iterator[Stage]:
    """Stages of the launch, the first and the last among them, with a layer of each kind."""
    found = stages(launch)
    count = small.pipeline_model_parallel_size * (small.virtual_pipeline_model_parallel_size or 1)
    if count == 1:
        everything = [index for stage in found for index in stage.decoder_layers]
        mtp = [index for stage in found for index in stage.mtp_layers]
        yield dataclasses.replace(
            found[0],
            decoder_layers=tuple(_of_each_kind(config, everything, 2 * _MOST_LAYERS_OF_A_STAGE)),
            mtp_layers=tuple(mtp[:_MOST_MTP_LAYERS]),
            output=True,
        )
        return
    size = small.pipeline_model_parallel_size
    with_mtp = next((number for number, stage in enumerate(found) if stage.mtp_layers), None)
    numbers = [round(place * (len(found) - 1) / (count - 1)) for place in range(count)]
    if with_mtp is not None and with_mtp not in numbers:
        numbers[-2] = with_mtp
    for place, number in enumerate(numbers):
        stage = found[number]
        layers = _of_each_kind(config, stage.decoder_layers, _MOST_LAYERS_OF_A_STAGE)
        yield dataclasses.replace(
            stage,
            pp=place % size,
            vpp=place // size,
            decoder_layers=tuple(layers),
            mtp_layers=stage.mtp_layers[:_MOST_MTP_LAYERS],
        )


def _of_each_kind(config: Step35Config, layers: Sequence[int], most: int) -> list[int]:
    """Some of the layers, different ones before more of the same."""
    kinds: dict[tuple[object, ...], int] = {}
    for index in layers:
        plan = config.layers[index]
        kind = (plan.attention_type, plan.is_moe, plan.swiglu_limit, plan.swiglu_limit_shared)
        kinds.setdefault(kind, index)
    chosen = sorted(kinds.values())[:most]
    for index in layers:
        if len(chosen) == min(most, len(layers)):
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def _laid_out(small: Launch, chosen: Sequence[Stage]) -> Launch:
    """With a layout in Megatron's letters, unless its even division is the same."""
    try:
        found = stages(small)
    except LaunchError:
        found = []
    wanted = [(len(stage.decoder_layers), len(stage.mtp_layers)) for stage in chosen]
    if [(len(stage.decoder_layers), len(stage.mtp_layers)) for stage in found] == wanted:
        return small
    letters = [
        "E" * (place == 0) + "t" * decoder + "m" * mtp + "L" * (place == len(wanted) - 1)
        for place, (decoder, mtp) in enumerate(wanted)
    ]
    return dataclasses.replace(small, pipeline_model_parallel_layout="|".join(letters))


def _layout_words(small: Launch) -> list[str]:
    words = [
        *("--tensor-model-parallel-size", str(small.tensor_model_parallel_size)),
        *("--pipeline-model-parallel-size", str(small.pipeline_model_parallel_size)),
        *("--context-parallel-size", str(small.context_parallel_size)),
        *("--expert-model-parallel-size", str(small.expert_model_parallel_size)),
        *("--expert-tensor-parallel-size", str(small.expert_tensor_parallel_size)),
    ]
    if small.sequence_parallel:
        words.append("--sequence-parallel")
    if small.pipeline_model_parallel_layout is not None:
        words += ["--pipeline-model-parallel-layout", small.pipeline_model_parallel_layout]
    elif small.virtual_pipeline_model_parallel_size is not None:
        virtual = str(small.virtual_pipeline_model_parallel_size)
        words += ["--num-virtual-stages-per-pipeline-rank", virtual]
    return words


def _kept(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """What stays of the launch's arguments.

    Returns:
        They themselves; the options that are left out for want of a GPU, or because their value is
        not known; whether the launch's data is here.
    """
    actions = megatron_parser()._actions
    known = {name: action.dest for action in actions for name in action.option_strings}
    groups = [
        (name, values, known.get(name.partition("=")[0], ""))
        for name, values in argument_groups(arguments)
    ]
    by_name = {dest: values for _, values, dest in groups}
    data = _is_here(by_name)
    words: list[str] = []
    dropped: list[str] = []
    for name, values, dest in groups:
        if dest in (*_SIZES, *_SCHEDULE, *_CHECKPOINTS) or dest.startswith(_LOGS):
            continue
        if dest in _DATA:
            if data and dest != "num_workers":
                words += [name, *values]
        elif (
            dest in _KERNELS
            or dest.startswith(_KERNEL_PREFIXES)
            or any(unknowns(value) for value in values)
        ):
            dropped.append(name)
        else:
            words += [name, *values]
    return words, dropped, data


def _is_here(values: dict[str, list[str]]) -> bool:
    """Whether the launch's data and its tokenizer are on this machine."""
    paths = [word for word in values.get("data_path", []) if not word.replace(".", "").isdigit()]
    tokenizer = values.get("tokenizer_model", [])
    return bool(paths) and all(
        os.path.exists(path) or glob.glob(glob.escape(path) + ".*") for path in [*paths, *tokenizer]
    )


def _changes(
    config: Step35Config,
    launch: Launch,
    small: Launch,
    length: int,
    dropped: Sequence[str],
    *,
    data: bool,
) -> Iterator[str]:
    yield f"processes: {launch.world_size} -> {small.world_size}, on the CPU with gloo"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers",
        "mtp_num_layers",
    ):
        before, after = getattr(launch, name), getattr(small, name)
        if before != after:
            yield f"{name}: {before} -> {after or 'none'}"
    if small.pipeline_model_parallel_layout is not None:
        yield f"pipeline_model_parallel_layout: {small.pipeline_model_parallel_layout}"
    yield f"hidden_size, heads, experts, vocabulary: those of a model for a CPU; {length} tokens"
    yield "weights: random, in place of a checkpoint"
    yield (
        "data: the launch's own"
        if data
        else ("data: made up, because --data-path and --tokenizer-model are not here")
    )
    if launch.transformer_impl != "local":
        yield f"transformer_impl: {launch.transformer_impl} -> local, without a GPU's kernels"
    if _loads_no_optimizer(launch):
        yield (
            "resumed without the distributed optimizer's state, which Apex's Adam or Transformer "
            "Engine's is needed for"
        )
    if dropped:
        yield f"left out: {' '.join(dict.fromkeys(dropped))}"
