"""Megatron's parsed arguments held against a Step-3.5 config: filled in, and what cannot work."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from step35_patch.arguments import megatron_options
from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.model.communication import cp_comm_type_problems
from step35_patch.model.low_precision import low_precision_problems
from step35_patch.model.megatron_fields import FIELDS
from step35_patch.model.refused_options import Place, missing_for, refused, without_effect

# Options of `megatron_options` that are a user's to choose: an explicit value wins.
_CHOICES = {row.option for row in FIELDS if row.is_default}

# The options of what `without_effect` names.
_OPTIONS = {
    "moe_aux_loss_coeff": "--moe-aux-loss-coeff",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
}


# What a message on a TransformerConfig says of the way out, on the command line.
_OPTIONS_FOR = {
    "the gate layout expanded": "--step35-gate-layout expanded",
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
}


class _Given(argparse.Namespace):
    """A namespace in which argparse leaves only what stands on the command line.

    argparse sets a default where an attribute is missing; here none is.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # argparse's own
            raise AttributeError(name)
        return None


def given_on(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The arguments that stand on a command line, by their names, without any default."""
    return vars(parser.parse_known_args(words, namespace=_Given())[0])


def fill_in(
    args: Any, given: dict[str, Any], config: Step35Config, parser: argparse.ArgumentParser
) -> list[Problem]:
    """Set the shape arguments that the user left out.

    Args:
        args: the parsed arguments, changed in place.
        given: those of them that stood on the command line.
        config: the model.
        parser: Megatron's, which turns the options' strings into values.

    Returns:
        One for each given argument that contradicts the config.
    """
    problems = []
    for option, value in megatron_options(config).items():
        tokens = [option] if value is None else [option, value]
        [(name, wanted)] = given_on(parser, tokens).items()
        if name == "padded_vocab_size" and "make_vocab_size_divisible_by" in given:
            continue  # Megatron is asked to pad by itself
        if name not in given:
            setattr(args, name, wanted)
        elif option in _CHOICES or given[name] == wanted:
            continue
        elif name == "mtp_num_layers" and 0 <= given[name] < wanted:
            # Fewer MTP layers are trained; the others stay as they are.
            if getattr(args, "use_checkpoint_args", False):
                problems.append(
                    Problem(
                        "--use-checkpoint-args",
                        f"none with --mtp-num-layers {given[name]}, which it would replace by the "
                        "checkpoint's",
                        "it",
                        "leave it out; the shapes come from the config",
                    )
                )
        else:
            problems.append(
                Problem(
                    option,
                    f"{wanted}, which the config needs",
                    str(given[name]),
                    "leave it out; the shapes come from the config",
                )
            )
    if _is_packed(args) and "create_attention_mask_in_dataloader" not in given:
        args.create_attention_mask_in_dataloader = False  # its batches are packed and have none
    if given.get("mtp_num_layers") == 0:
        args.mtp_num_layers = None  # Megatron's for no MTP layers; of 0 it would build a block
    full = next((p for p in config.layers if p.window_size is None), config.layers[0])
    for name, wanted in {
        "rotary_base": full.rotary_base,
        "rotary_percent": full.rotary_percent,
    }.items():
        # Without effect: each layer has its own. Right of the full layers, they may stay.
        if name in given and given[name] != wanted:
            problems.append(
                Problem(
                    f"--{name.replace('_', '-')}",
                    f"{wanted:g}, which the config has for the full-attention layers",
                    f"{given[name]:g}",
                    "leave it out, each layer has its own",
                )
            )
    return problems


def layout_problems(args: Any, config: Step35Config, gate_layout: str) -> list[Problem]:
    """One for each argument that can't work with the model, with the way out.

    Args:
        args: parsed, not necessarily validated arguments of Megatron.
        config: the model.
        gate_layout: "headwise" or "expanded".
    """
    problems = [
        Problem(row.option, f"{row.legal[0]}", f"{found}", f"{row.reason}: leave it out")
        for row, found in refused(args, Place.ARGUMENT)
    ]
    problems += [
        Problem(_OPTIONS[name], expected, f"{found}", "leave it out")
        for name, expected, found in without_effect(args)
    ]
    problems += _optimizer_problems(args)
    problems += _attention_mask_problems(args)
    if args.transformer_impl == "inference_optimized":
        problems.append(
            Problem(
                "--transformer-impl",
                "transformer_engine or local",
                "inference_optimized",
                "Step-3.5 layers train and evaluate only",
            )
        )
    if _is_packed(args):
        problems += _packing_problems(args)
    if no_sizes := _no_sizes(args):  # nothing can be divided by them
        return problems + no_sizes
    problems += _parallel_size_problems(args, config)
    problems += _low_precision_problems(args, config, gate_layout)
    if args.context_parallel_size > 1:
        problems += _context_parallel_problems(args, config)
    return problems


def _no_sizes(args: Any) -> list[Problem]:
    sizes = {
        f"--{name}-parallel-size": getattr(args, f"{name.replace('-', '_')}_parallel_size")
        for name in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor")
    }
    return [
        Problem(option, "1 or more", f"{size}", "leave it out for 1")
        for option, size in sizes.items()
        if size is not None and size < 1  # Megatron's default of the last one is None
    ]


def installed_problems(args: Any) -> list[Problem]:
    """One for each package that the arguments need and this environment does not have."""
    missing = missing_for(args.optimizer)
    return [] if missing is None else [dataclasses.replace(missing, argument="--optimizer")]


def _optimizer_problems(args: Any) -> list[Problem]:
    problems = []
    # Releases with this argument make the optimizer of a rank's own matrices of two that need it.
    layer_wise = args.optimizer == "dist_muon" or (
        args.optimizer == "muon" and args.use_distributed_optimizer
    )
    if layer_wise and hasattr(args, "use_layer_wise_param_layout") and not args.bf16:
        problems.append(
            Problem(
                "--bf16",
                f"it with --optimizer {args.optimizer} and a distributed optimizer, which "
                "Megatron-Core's Muon cannot make in fp32",
                "none",
                "add it, or leave out --use-distributed-optimizer",
            )
        )
    if args.step35_decay_1d and not (args.weight_decay or args.end_weight_decay):
        problems.append(
            Problem("--weight-decay", "more than 0 with --step35-decay-1d", "0", "give it")
        )
    if args.step35_decay_1d and args.apply_wd_to_qk_layernorm:
        problems.append(
            Problem(
                "--apply-wd-to-qk-layernorm",
                "none with --step35-decay-1d, which covers it",
                "it",
                "leave it out",
            )
        )
    return problems


def _attention_mask_problems(args: Any) -> list[Problem]:
    """Of documents that must not see each other."""
    problems = []
    if args.reset_attention_mask:
        packed = "--dataloader-inter-document-masking (0.19) or --sft"
        if args.transformer_impl != "local":
            problems.append(
                Problem(
                    "--reset-attention-mask",
                    f"none with --transformer-impl {args.transformer_impl}, whose causal attention "
                    "ignores the mask",
                    "it",
                    f"use {packed}",
                )
            )
        elif not args.create_attention_mask_in_dataloader:
            problems.append(
                Problem(
                    "--reset-attention-mask",
                    "none without a mask from the data loader (--sft, "
                    "--no-create-attention-mask-in-dataloader)",
                    "it",
                    f"leave one out, or use {packed}",
                )
            )
    if args.reset_position_ids and (args.sft or not args.reset_attention_mask):
        problems.append(
            Problem(
                "--reset-position-ids",
                "none with --sft, which does it, and without --reset-attention-mask, where RoPE, "
                "which is relative, makes nothing of it",
                "it",
                "leave it out",
            )
        )
    return problems


def _parallel_size_problems(args: Any, config: Step35Config) -> list[Problem]:
    problems = []
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    groups = config.num_attention_groups
    if groups % tp:
        problems.append(
            Problem(
                "--tensor-model-parallel-size",
                f"a divisor of num_attention_groups={groups}",
                f"{tp}",
                "use fewer, and --expert-model-parallel-size or --pipeline-model-parallel-size for "
                "more GPUs",
            )
        )
    if args.padded_vocab_size is not None and args.padded_vocab_size % tp:
        problems.append(
            Problem(
                "--padded-vocab-size",
                f"a multiple of --tensor-model-parallel-size {tp}",
                f"{args.padded_vocab_size}",
                f"the config's vocab_size is {config.vocab_size}, and a larger padded size is the "
                "same model while --step35-padded-logits is masked",
            )
        )
    expert_ranks = ep * (args.expert_tensor_parallel_size or tp) * args.pipeline_model_parallel_size
    if (
        args.overlap_param_gather_with_optimizer_step
        and ep > 1
        and args.world_size > expert_ranks  # its experts are on several data-parallel ranks
    ):
        problems.append(
            Problem(
                "--overlap-param-gather-with-optimizer-step",
                f"none with --expert-model-parallel-size {ep}: Megatron-Core would gather the "
                "first model chunk's experts before their step, and train on old ones",
                "it",
                "leave it out, --overlap-param-gather is right",
            )
        )
    if config.moe_layers_enum:
        expected, fix = f"a divisor of moe_num_experts={config.moe_num_experts}", "use another size"
        has_part = config.moe_num_experts % ep == 0
    else:
        expected, fix = "1 for a model without experts", "leave it out"
        has_part = ep == 1
    if not has_part:
        problems.append(Problem("--expert-model-parallel-size", expected, f"{ep}", fix))
    return problems


def _low_precision_problems(args: Any, config: Step35Config, gate_layout: str) -> list[Problem]:
    problems = []
    for problem in low_precision_problems(args, config, gate_layout):
        fix = problem.fix
        for words, option in _OPTIONS_FOR.items():
            fix = fix.replace(words, option)
        problems.append(dataclasses.replace(problem, argument=_OPTIONS[problem.argument], fix=fix))
    return problems


def _is_packed(args: Any) -> bool:
    """Whether batches are packed documents; the second argument is not in each release."""
    return args.sft or getattr(args, "dataloader_inter_document_masking", False)


def _packing_problems(args: Any) -> list[Problem]:
    """Of batches of packed documents."""
    option = "--sft" if args.sft else "--dataloader-inter-document-masking"
    problems = []
    if args.micro_batch_size not in (None, 1):
        problems.append(
            Problem(
                "--micro-batch-size",
                f"1 with {option}",
                f"{args.micro_batch_size}",
                "a longer --seq-length packs more documents",
            )
        )
    if args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        problems.append(
            Problem(
                "--calculate-per-token-loss",
                f"it with {option} and --context-parallel-size {args.context_parallel_size}: "
                "without it each rank's gradients are the mean over its own tokens, of which "
                "prompts and padding leave a different number on each",
                "none",
                "add it",
            )
        )
    return problems


def _context_parallel_problems(args: Any, config: Step35Config) -> list[Problem]:
    problems = []
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    local = args.transformer_impl == "local"
    # Not in each release.
    if local and getattr(args, "hybrid_context_parallel", False):
        problems.append(
            Problem(
                "--hybrid-context-parallel",
                "none with --transformer-impl local, on which each batch is cut for "
                f"--context-parallel-size {cp}",
                "it",
                "leave it out, or use --transformer-impl transformer_engine",
            )
        )
    if local and args.reset_attention_mask:
        problems.append(
            Problem(
                "--reset-attention-mask",
                f"none with --context-parallel-size {cp} and --transformer-impl local, on which a "
                "mask is not cut",
                "it",
                "use --context-parallel-size 1, or packed documents (--sft, 0.19's "
                "--dataloader-inter-document-masking)",
            )
        )
    elif local and args.create_attention_mask_in_dataloader:
        problems.append(
            Problem(
                "--no-create-attention-mask-in-dataloader",
                f"it with --context-parallel-size {cp} and --transformer-impl local",
                "none",
                "add it; attention is causal without a mask",
            )
        )
    if args.transformer_impl == "transformer_engine":
        problems += [
            dataclasses.replace(problem, argument="--cp-comm-type")
            for problem in cp_comm_type_problems(args.cp_comm_type or ["p2p"], config, tp, cp)
        ]
    return problems
