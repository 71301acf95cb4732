"""Megatron's own checks of a launch, run on this machine: the last that is left to go wrong.

They are its functions, `validate_args` and `core_transformer_config_from_args`, on a copy of the
arguments, with the stand-in for CUDA, and as one process of as many as the launch has. They end at
the first thing that is wrong, so that at most one problem comes of them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from step35_patch.config.problem import Problem
from step35_patch.launch.values import unknowns

# Kernels that a TransformerConfig is refused with where their package is not installed. It has to
# be where the launch runs, not here.
_KERNELS = {"apply_rope_fusion": False, "gradient_accumulation_fusion": False}


def upstream_problems(
    args: Any, environment: Mapping[str, str], flagged: Collection[str]
) -> list[Problem]:
    """What Megatron refuses of arguments that are otherwise in order; empty, or one problem.

    Args:
        args: parsed, with the config's shapes filled in; not changed.
        environment: of the launch.
        flagged: options that are a problem already. What is about them is left out.
    """
    from megatron.training import arguments

    args = copy.deepcopy(args)
    if importlib.util.find_spec("transformer_engine") is None:
        vars(args).update(_KERNELS)
    with _environment(environment), _silence():
        try:
            arguments.validate_args(args)
            arguments.core_transformer_config_from_args(args)
        except (Exception, SystemExit) as error:  # any of the hundred assertions, each its own way
            problem = _problem(error, args)
        else:
            return []
    # What is derived of an argument is wrong with it.
    named = {name.replace("--eval-", "--") for name in problem.argument.split(", ")}
    return [] if named & set(flagged) else [problem]


def _problem(error: BaseException, args: Any) -> Problem:
    frames = traceback.extract_tb(error.__traceback__)
    statement = (frames[-1].line or "").strip() if frames else ""
    message = " ".join(str(error).split())
    options = [
        option.replace("_", "-")
        for option in dict.fromkeys(
            re.findall(r"--[a-z][\w-]+", message)
            + [f"--{name}" for name in re.findall(r"\b(?:args|self)\.([a-z_0-9]+)", statement)]
            + [f"--{name}" for name in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", message)]
        )
        if hasattr(args, option.removeprefix("--").replace("-", "_"))
    ][:4]
    found = ", ".join(
        f"{option} {getattr(args, option.removeprefix('--').replace('-', '_'))}"
        for option in options
    )
    where = os.path.basename(frames[-1].filename) if frames else "Megatron-Core"
    return Problem(
        ", ".join(options) or f"{where}",
        f"what Megatron-Core asks for in {where}: {message or statement}",
        found or "otherwise",
        "change it; what comes after this check of Megatron-Core's has not been looked at",
    )


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The launch's variables, as far as they are known, and one process of its own."""
    before = dict(os.environ)
    known = {name: value for name, value in variables.items() if not unknowns(value)}
    own = {name: value for name, value in known.items() if not name.startswith("STEP35_")}
    os.environ.update(own | {"RANK": "0"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what Megatron prints, warns and logs on the way."""
    disabled = logging.root.manager.disable
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(disabled)
            sys.stdout.flush()
