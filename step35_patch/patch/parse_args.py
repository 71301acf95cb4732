"""Megatron's command line with a Step-3.5 config: own arguments, shapes filled in, conflicts.

`parse` stands around `megatron.training.arguments.parse_args`. What the config decides is filled in
where the user said nothing; what the user said otherwise, and what cannot work with this model, is
one error that lists everything, before Megatron touches a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from step35_patch import settings as process
from step35_patch.arguments import megatron_options
from step35_patch.config.model import Step35Config

# Options of megatron_options that are a user's to choose: an explicit value wins.
_CHOICES = {
    "--hidden-dropout",
    "--attention-dropout",
    "--moe-router-load-balancing-type",
    "--max-position-embeddings",
    "--vocab-size",
    "--padded-vocab-size",
}

# Arguments that Megatron-Core applies to all layers alike, or that make other layers: attribute of
# the parsed arguments, its only legal values. Attributes that a version lacks are passed over.
_FIXED: dict[str, tuple] = {
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "rotary_interleaved": (False,),
    "no_rope_freq": (None,),
    "window_size": (None,),
    "window_attn_skip_freq": (None,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "qk_clip": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "spec": (None,),
    "flash_decode": (False,),
    "cuda_graph_impl": ("none", None),
    "external_cuda_graph": (False,),
    "enable_cuda_graph": (False,),
    "use_kitchen": (False,),
    "use_transformer_engine_op_fuser": (False,),
    "fused_single_qkv_rope": (False,),
    "mtp_use_repeated_layer": (False,),
    "moe_shared_expert_gate": (False,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "fp32_residual_connection": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "use_mup": (False,),
}


class Step35ArgumentError(ValueError):
    """Megatron arguments that don't go with the Step-3.5 config; the message lists all of them."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = tuple(problems)
        shown = "\n  ".join(problems)
        super().__init__(
            f"{len(problems)} argument(s) don't go with the Step-3.5 config ({source}):\n  {shown}"
        )


class _Given(argparse.Namespace):
    """A namespace in which argparse leaves only what stands on the command line.

    argparse sets a default where an attribute is missing; here none is.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # argparse's own
            raise AttributeError(name)
        return None


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the package's own arguments; each wins over the environment variable."""
    group = parser.add_argument_group(
        title="Step-3.5 (step35_patch)",
        description="With a config, the model's shape arguments are filled in from it.",
    )
    group.add_argument(
        "--step35-config",
        metavar="PATH",
        help="config.json of the model, or a folder with one (STEP35_CONFIG)",
    )
    group.add_argument(
        "--step35-gate-layout",
        choices=process.GATE_LAYOUTS,
        help="rows of the attention gate: one a head, or Megatron-Core's attention_output_gate "
        "layout (STEP35_GATE_LAYOUT; headwise)",
    )
    group.add_argument(
        "--step35-window",
        choices=process.WINDOWS,
        help="a sliding layer's query sees W keys, or W + 1 (STEP35_WINDOW; hf)",
    )
    return parser


def parse(parse_args: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Parse with the package's arguments added, and complete the result.

    Args:
        parse_args: Megatron's function.
        call: its arguments by name.

    Returns:
        The parsed arguments. With a config they have the model's shape, and besides
        `step35_fingerprint`, `step35_gate_layout` and `step35_window`, which Megatron saves with
        each checkpoint.

    Raises:
        Step35ConfigError: the config is not usable.
        Step35ArgumentError: arguments contradict the config, or can't work with the model.
    """
    extra = call.get("extra_args_provider")
    parsers: list[argparse.ArgumentParser] = []

    def with_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(add_arguments(extra(parser) if extra is not None else parser))
        return parsers[0]

    args = parse_args(**(call | {"extra_args_provider": with_ours}))
    _activate(args)
    settings = process.active()
    if settings is None:
        return args
    given = vars(parsers[0].parse_known_args(sys.argv[1:], namespace=_Given())[0])
    if "yaml_cfg" in given:  # has replaced the parsed arguments by others
        raise Step35ArgumentError(
            settings.source, ["--yaml-cfg: expected none, the shapes come from the config"]
        )
    problems = fill_in(args, given, settings.config, parsers[0])
    problems += layout_problems(args, settings.config)
    if problems:
        raise Step35ArgumentError(settings.source, problems)
    args.step35_fingerprint = settings.config.fingerprint
    args.step35_gate_layout = settings.gate_layout
    args.step35_window = settings.window
    return args


def _activate(args: Any) -> None:
    """Let the command line win over the variables and over an earlier `activate`."""
    # A --yaml-cfg replaces the parsed arguments by its own, which have none of these.
    path, gate_layout, window = (
        getattr(args, f"step35_{name}", None) for name in ("config", "gate_layout", "window")
    )
    if path is None and gate_layout is None and window is None:
        return
    settings = process.active()
    if path is None and settings is None:
        raise Step35ArgumentError(
            "none",
            [
                "--step35-gate-layout and --step35-window: expected a config with them, found none; "
                "give --step35-config or STEP35_CONFIG"
            ],
        )
    if path is None:
        path = settings.source if os.path.exists(settings.source) else settings.config
    process.ask_for(
        path,
        gate_layout or (settings and settings.gate_layout),
        window or (settings and settings.window),
    )


def fill_in(
    args: Any, given: dict[str, Any], config: Step35Config, parser: argparse.ArgumentParser
) -> list[str]:
    """Set the shape arguments that the user left out.

    Args:
        args: the parsed arguments, changed in place.
        given: those of them that stood on the command line.
        config: the model.
        parser: Megatron's, which turns the options' strings into values.

    Returns:
        A line for each given argument that contradicts the config.
    """
    problems = []
    for option, value in megatron_options(config).items():
        tokens = [option] if value is None else [option, value]
        [(name, wanted)] = vars(parser.parse_args(tokens, namespace=_Given())).items()
        if name == "padded_vocab_size" and "make_vocab_size_divisible_by" in given:
            continue  # Megatron is asked to pad by itself
        if name not in given:
            setattr(args, name, wanted)
        elif option in _CHOICES or given[name] == wanted:
            continue
        elif name == "mtp_num_layers" and given[name] and 0 < given[name] < wanted:
            continue  # fewer MTP layers are trained; the others stay as they are
        else:
            problems.append(f"{option}: the config needs {wanted}, found {given[name]}")
    full = next((p for p in config.layers if p.window_size is None), config.layers[0])
    for name, wanted in {
        "rotary_base": full.rotary_base,
        "rotary_percent": full.rotary_percent,
    }.items():
        # Without effect: each layer has its own. Right of the full layers, they may stay.
        if name in given and given[name] != wanted:
            problems.append(
                f"--{name.replace('_', '-')}: the config needs {wanted:g} (of the full-attention "
                f"layers), found {given[name]:g}; leave it out, each layer has its own"
            )
    return problems


def layout_problems(args: Any, config: Step35Config) -> list[str]:
    """A line for each argument that can't work with the model, with the way out.

    Args:
        args: parsed, not necessarily validated arguments of Megatron.
        config: the model.
    """
    problems = [
        f"--{name.replace('_', '-')}: expected {legal[0]}, found {getattr(args, name)}; layers "
        "of Step-3.5 differ and take this from the config: leave it out"
        for name, legal in _FIXED.items()
        if getattr(args, name, legal[0]) not in legal
    ]
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    groups = config.num_attention_groups
    if groups % tp:
        problems.append(
            f"--tensor-model-parallel-size: expected a divisor of num_attention_groups={groups}, "
            f"found {tp}; use fewer, and --expert-model-parallel-size or "
            "--pipeline-model-parallel-size for more GPUs"
        )
    if args.padded_vocab_size is not None and args.padded_vocab_size % tp:
        problems.append(
            f"--padded-vocab-size: expected a multiple of --tensor-model-parallel-size {tp}, found "
            f"{args.padded_vocab_size}; the config's vocab_size is {config.vocab_size}, a larger "
            "padded size is fine"
        )
    ep = args.expert_model_parallel_size
    if ep > 1 and (not config.use_moe or config.moe_num_experts % ep):
        problems.append(
            f"--expert-model-parallel-size: expected a divisor of moe_num_experts="
            f"{config.moe_num_experts}, found {ep}"
        )
    if args.transformer_impl == "inference_optimized":
        problems.append(
            "--transformer-impl: expected transformer_engine or local, found inference_optimized; "
            "Step-3.5 layers train and evaluate only"
        )
    if cp > 1 and args.transformer_impl == "local":
        if getattr(args, "create_attention_mask_in_dataloader", False):
            problems.append(
                "--context-parallel-size: with --transformer-impl local, expected "
                "--no-create-attention-mask-in-dataloader besides; attention is causal without it"
            )
    if cp > 1 and args.transformer_impl == "transformer_engine" and _has_window(config):
        kinds = args.cp_comm_type or ["p2p"]
        if wrong := [kind for kind in kinds if kind not in ("a2a", "all_gather")]:
            problems.append(
                f"--cp-comm-type: expected a2a or all_gather, with which Transformer Engine knows "
                f"sliding windows, found {' '.join(wrong)}"
            )
        elif "a2a" in kinds and groups % (tp * cp):
            problems.append(
                f"--context-parallel-size: with --cp-comm-type a2a, expected that "
                f"num_attention_groups={groups} can be divided by tensor x context parallel size, "
                f"found {tp} x {cp}; use --cp-comm-type all_gather"
            )
    return problems


def _has_window(config: Step35Config) -> bool:
    return any(plan.window_size is not None for plan in config.layers)
