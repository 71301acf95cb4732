"""Megatron's command line with a Step-3.5 config: the wrapper around Megatron's parser.

`parse` stands around `megatron.training.arguments.parse_args` and adds the package's own arguments.
What the config decides is filled in where the user said nothing; what the user said otherwise, and
what cannot work with this model (`step35_patch.patch.arguments`), is one error that lists
everything, before Megatron touches a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from step35_patch import settings as process
from step35_patch.config.comparison import ACCEPTED, MAY_CHANGE, not_acceptable, recorded
from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.patch.arguments import (
    fill_in,
    given_on,
    installed_problems,
    layout_problems,
)
from step35_patch.patch.notices import warn

# It replaces the parsed arguments by its own, before they could be completed.
YAML = Problem("--yaml-cfg", "none", "it", "give arguments; the shapes come from the config")


class Step35ArgumentError(ValueError):
    """Megatron arguments that don't go with the Step-3.5 config; the message lists all of them.

    Attributes:
        problems: each of them.
    """

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        shown = "\n  ".join(map(str, problems))
        super().__init__(
            f"{len(problems)} argument(s) don't go with the Step-3.5 config ({source}):\n  {shown}"
        )


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
    group.add_argument(
        "--step35-padded-logits",
        choices=process.PADDED_LOGITS,
        help="the logits' columns that only pad the vocabulary: left out of the softmax, or kept "
        "in it as Megatron-Core does (STEP35_PADDED_LOGITS; masked)",
    )
    group.add_argument(
        "--step35-accept-changed",
        nargs="+",
        metavar="FIELD",
        help="fields of the config in which the loaded checkpoint's may differ, of "
        f"{', '.join(MAY_CHANGE)} (STEP35_ACCEPT_CHANGED, with commas; none)",
    )
    group.add_argument(
        "--step35-decay-1d",
        action="store_true",
        default=None,
        help="--weight-decay on parameters of one dimension too (the norms' weights, zero-centred, "
        "which Megatron leaves out), as the authors train",
    )
    return parser


def parse(parse_args: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Parse with the package's arguments added, and complete the result.

    Args:
        parse_args: Megatron's function.
        call: its arguments by name.

    Returns:
        The parsed arguments. With a config they have the model's shape, and also
        `step35_fingerprint`, `step35_config_document`, `step35_gate_layout`, `step35_window` and
        `step35_padded_logits`, which Megatron saves with each checkpoint.

    Raises:
        Step35ConfigError: the config is not usable.
        Step35ArgumentError: arguments contradict the config, or can't work with the model.
    """
    extra = call.get("extra_args_provider")
    parsers: list[argparse.ArgumentParser] = []

    def with_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        theirs = extra(parser) if extra is not None else parser  # nosec B610  # not Django's extra()
        parsers.append(add_arguments(theirs))
        return parsers[0]

    args = parse_args(**(call | {"extra_args_provider": with_ours}))
    _activate(args)
    settings = process.active()
    if settings is None:
        return args
    given = given_on(parsers[0], sys.argv[1:])
    if "yaml_cfg" in given:  # has replaced the parsed arguments by others
        raise Step35ArgumentError(settings.source, [YAML])
    problems = complete(args, given, settings, parsers[0]) + installed_problems(args)
    if problems:
        raise Step35ArgumentError(settings.source, problems)
    _warn_from_scratch(args, given)
    if args.log_params_norm and settings.gate_layout == "expanded":
        warn(
            "--log-params-norm counts all rows of the expanded gate, of which each head's are equal"
        )
    return args


def complete(
    args: Any, given: dict[str, Any], settings: process.Settings, parser: argparse.ArgumentParser
) -> list[Problem]:
    """Fill in what the config decides and what Megatron saves of it with each checkpoint.

    Args:
        args: the parsed arguments, changed in place.
        given: those of them that stood on the command line.
        settings: the model.
        parser: Megatron's with the package's arguments.

    Returns:
        All that contradicts the config or can't work with it.
    """
    problems = fill_in(args, given, settings.config, parser)
    problems += layout_problems(args, settings.config, settings.gate_layout)
    problems += _complete_accepted(args)
    vars(args).update(recorded(settings.config))
    args.step35_gate_layout = settings.gate_layout
    args.step35_window = settings.window
    args.step35_padded_logits = settings.padded_logits
    return problems


def _warn_from_scratch(args: Any, given: dict[str, Any]) -> None:
    """Tell a run without published weights what its experts start from, and what balances them."""
    if args.num_experts is None or args.load is not None or args.pretrained_checkpoint is not None:
        return
    if args.use_cpu_initialization and args.expert_model_parallel_size > 1:
        warn(
            "--use-cpu-initialization with --expert-model-parallel-size "
            f"{args.expert_model_parallel_size}: Megatron-Core starts the experts of all ranks "
            "alike. Start from a checkpoint, or without --use-cpu-initialization"
        )
    if (
        args.moe_router_bias_update_rate == 0
        and args.moe_router_load_balancing_type in ("none", ["none"])
        and "moe_router_bias_update_rate" not in given
    ):
        warn(
            "neither --load nor --pretrained-checkpoint is given, and nothing balances the experts "
            "of a run from scratch: the router's bias stays as it is, which is right of the "
            "published weights. Give --moe-router-bias-update-rate (Megatron's default is 1e-3; 0 "
            "for none), or an auxiliary loss"
        )


def _complete_accepted(args: Any) -> list[Problem]:
    """Set which changed fields are accepted, and tell what is wrong with them."""
    option = "--step35-accept-changed"
    if getattr(args, ACCEPTED, None) is None:
        names = os.environ.get("STEP35_ACCEPT_CHANGED", "").split(",")
        setattr(args, ACCEPTED, [name.strip() for name in names if name.strip()])
    accepted: list[str] = getattr(args, ACCEPTED)
    problems = not_acceptable(accepted, option)
    if accepted and not (args.load or getattr(args, "pretrained_checkpoint", None)):
        problems.append(
            Problem("--load", f"a checkpoint with {option}", "none", "give it, or leave both out")
        )
    return problems


def _activate(args: Any) -> None:
    """Let the command line win over the variables and over an earlier `activate`."""
    # A --yaml-cfg replaces the parsed arguments by its own, which have none of these.
    path: str | None = getattr(args, "step35_config", None)
    gate_layout: str | None = getattr(args, "step35_gate_layout", None)
    window: str | None = getattr(args, "step35_window", None)
    padded_logits: str | None = getattr(args, "step35_padded_logits", None)
    accepted: list[str] | None = getattr(args, ACCEPTED, None)
    decay_1d: bool | None = getattr(args, "step35_decay_1d", None)
    ours = (path, gate_layout, window, padded_logits, accepted, decay_1d)
    if all(given is None for given in ours):
        return
    settings = process.active()
    if settings is not None:
        known: str | Step35Config = settings.config
        if os.path.exists(settings.source):
            known = settings.source
        process.ask_for(
            known if path is None else path,
            gate_layout or settings.gate_layout,
            window or settings.window,
            padded_logits or settings.padded_logits,
        )
    elif path is not None:
        process.ask_for(path, gate_layout, window, padded_logits)
    else:
        raise Step35ArgumentError(
            "none",
            [
                Problem(
                    "--step35-gate-layout, --step35-window, --step35-padded-logits, "
                    "--step35-accept-changed and --step35-decay-1d",
                    "a config with them",
                    "none",
                    "give --step35-config or STEP35_CONFIG",
                )
            ],
        )
