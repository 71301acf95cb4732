"""One model everywhere: on all ranks of a run, and in a checkpoint and the run that loads it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

from step35_patch import settings as process
from step35_patch._version import __version__
from step35_patch.config.comparison import FINGERPRINT, Here, compare, recorded
from step35_patch.config.model import Step35Config
from step35_patch.patch.megatron_version import megatron_version
from step35_patch.patch.notices import say, warn
from step35_patch.settings import Settings

# How long a rank waits for the others to say what they build. They are past the same collectives.
_PATIENCE = timedelta(seconds=120)

# What both sides of a comparison must have in common, under the names that
# `parse_args.parse` gives them on Megatron's args: name, what it is.
_MODEL = {
    FINGERPRINT: "config fingerprint",
    "step35_gate_layout": "gate layout",
    "step35_window": "window",
}


# Arguments that decide which modules a model is made of, and so the order of its parameters.
_IMPLEMENTATION = ("transformer_impl", "moe_grouped_gemm")
# How a distributed optimizer's state lies in a checkpoint, in what Megatron notes of its content.
_SHARDING = "distrib_optim_sharding_type"

# This run's side of a comparison with a checkpoint.
_HERE = Here("in this run", "--step35-accept-changed")
HERE_IN_BRIDGE = Here("in this run", "the provider's accept_changed")


class Step35MismatchError(RuntimeError):
    """Two parts of a run, or a run and a checkpoint, are of different models."""


def _this_model(settings: Settings) -> dict[str, str]:
    values = (settings.config.fingerprint, settings.gate_layout, settings.window)
    return dict(zip(_MODEL, values, strict=True))


def check_ranks_agree(settings: Settings | None) -> None:
    """Compare the model and the versions over all ranks; collective among them.

    Args:
        settings: this rank's model; None: this rank's run is of another one.

    It goes through the store that torch.distributed was initialised with, not through a collective:
    a rank on which the package is not active would not come to one, and is named here.

    Raises:
        Step35MismatchError: ranks differ, or did not answer within two minutes; they are named.
    """
    # Megatron can be told to leave torch.distributed to its caller.
    if settings is None or not torch.distributed.is_initialized():
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = _this_model(settings) | {
        # Of the run only: any checkpoint can be loaded with either.
        "padded logits": settings.padded_logits,
        "step35_patch": __version__,
        "Megatron-Core": str(megatron_version()),
        "torch": torch.__version__,
    }
    store = distributed_c10d.PrefixStore("step35_patch", distributed_c10d._get_default_store())
    store.set(f"{rank}", "\n".join(f"{name}={value}" for name, value in own.items()))
    ranks = [str(other) for other in range(world)]
    try:
        store.wait(ranks, _PATIENCE)
    except torch.distributed.DistStoreError:
        silent = [other for other in ranks if not store.check([other])]
        raise Step35MismatchError(
            f"rank(s) {', '.join(silent)} did not say which Step-3.5 model they build: "
            "step35_patch is not active there. Give every node the same STEP35_ variables, "
            "arguments and installation."
        ) from None
    by_answer: dict[str, list[str]] = {}
    for other in ranks:
        by_answer.setdefault(store.get(other).decode(), []).append(other)
    if len(by_answer) > 1:
        answers = [dict(line.split("=", 1) for line in answer.split("\n")) for answer in by_answer]
        lines = [
            f"{_MODEL.get(name, name)}: "
            + ", ".join(
                f"{answer[name]} on rank(s) {' '.join(whose)}"
                for answer, whose in zip(answers, by_answer.values(), strict=True)
            )
            for name in own
            if len({answer[name] for answer in answers}) > 1
        ]
        raise Step35MismatchError(
            "the ranks are not of one model:\n  "
            + "\n  ".join(lines)
            + "\nGive every node the same config, STEP35_ variables, arguments and installation."
        )


def check_checkpoint(
    checkpoint_args: Any,
    name: str,
    settings: Settings | None,
    accept: Collection[str] = (),
    here: Here = _HERE,
) -> None:
    """Hold the arguments that a Megatron checkpoint carries against this run's model.

    Args:
        checkpoint_args: the namespace that Megatron saved; one without the package's entries is
            of another model, or was written by another program. A converted one has no window,
            which is none of the weights'.
        name: the checkpoint's, for messages.
        settings: this run's model; None: nothing is compared.
        accept: names of the config's fields that may differ
            (`step35_patch.config.comparison.MAY_CHANGE`).
        here: how messages call this run and its way to accept a field.

    Raises:
        Step35MismatchError: it is of another config, gate layout or window, or a field that may
            differ does not.
    """
    if settings is None:
        return
    found = {key: getattr(checkpoint_args, key, None) for key in _MODEL}
    if not any(found.values()) and not accept:
        warn(
            f"{name} does not say which Step-3.5 model it is of; only its tensors' names and "
            "shapes are checked"
        )
        return
    wanted = _this_model(settings)
    comparison = compare(checkpoint_args, settings.config, accept, here)
    lines = [*comparison.problems] + [
        f"{what}: {found[key]} in the checkpoint, {wanted[key]} in this run; set "
        f"{key.upper()}={found[key]}"
        for key, what in _MODEL.items()
        if key != FINGERPRINT and found[key] not in (None, wanted[key])
    ]
    if lines:
        raise Step35MismatchError(
            f"{name} does not go with this run's Step-3.5 model (config: {settings.source}):\n  "
            + "\n  ".join(lines)
        )
    if comparison.accepted:
        say("\n  ".join((f"{name} is of another config, as accepted:", *comparison.accepted)))


def recorded_by_bridge(checkpoint: str) -> Namespace | None:
    """What the run_config.yaml of a Megatron-Bridge checkpoint says of its model.

    Args:
        checkpoint: the folder of one iteration.

    Returns:
        What `check_checkpoint` reads of Megatron's arguments; None if there is no such file.
    """
    from megatron.bridge.training.utils.checkpoint_utils import (
        file_exists,
        get_checkpoint_run_config_filename,
        read_run_config,
    )

    file = get_checkpoint_run_config_filename(checkpoint)
    if not file_exists(file):
        return None
    model = read_run_config(file).get("model") or {}
    config = model.get("hf_config")
    document = config.get("data") if isinstance(config, dict) else None
    if document is None:  # of another provider
        return Namespace()
    return Namespace(
        step35_gate_layout=model.get("gate_layout"),
        step35_window=model.get("window"),
        **recorded(Step35Config.from_dict(document)),
    )


def check_mtp_layers(checkpoint_args: Any, args: Any, name: str) -> None:
    """Refuse a checkpoint with fewer MTP layers than this run builds; more are left alone.

    Args:
        checkpoint_args: as for `check_checkpoint`.
        args: this run's.
        name: the checkpoint's, for messages.

    Raises:
        Step35MismatchError: some of this run's MTP layers are not in it.
    """
    if process.active() is None or not hasattr(checkpoint_args, "mtp_num_layers"):
        return
    found, wanted = checkpoint_args.mtp_num_layers or 0, args.mtp_num_layers or 0
    if found < wanted:
        raise Step35MismatchError(
            f"{name} has {found} MTP layers, this run builds {wanted}: give it --mtp-num-layers "
            f"{found}, or a checkpoint with all of them, as `step35-patch convert to-megatron` "
            "makes of the published folder"
        )


def check_implementation(state: Any, args: Any, name: str) -> None:
    """Refuse a distributed optimizer's state that another implementation saved by place.

    Its default format keeps buckets as they lie in memory, parameter behind parameter. They are of
    one size in both implementations and in another order, so that weights and moments would come to
    lie in each other's places.

    Args:
        state: what a checkpoint has in common for all ranks, its arguments among it.
        args: this run's.
        name: the checkpoint's, for messages.

    Raises:
        Step35MismatchError: this run would load such a state.
    """
    saved = state["args"]
    if process.active() is None or not hasattr(saved, "transformer_impl"):
        return  # a converted checkpoint was saved by none
    if getattr(saved, "fp8", None) and args.transformer_impl == "local":
        warn(
            f"{name} was saved by a run in FP8, whose scales --transformer-impl local, which "
            "computes in the weights' dtype, leaves unread and does not save again"
        )
    optimizer_is_read = not (args.finetune or args.no_load_optim)
    by_place = (state.get("content_metadata") or {}).get(_SHARDING) == "dp_reshardable"
    changed = [
        (f"--{option.replace('_', '-')}", found, wanted)
        for option in _IMPLEMENTATION
        if (found := getattr(saved, option)) != (wanted := getattr(args, option))
    ]
    if changed and by_place and optimizer_is_read:
        raise Step35MismatchError(
            f"{name} has the state of a distributed optimizer in the order of its implementation's "
            "parameters, which this run's are not in:\n  "
            + "\n  ".join(
                f"{option}: {found} in the checkpoint, {wanted} in this run"
                for option, found, wanted in changed
            )
            + "\nGo on as it was saved, or with --no-load-optim; or save it once more as it was "
            "saved, with --dist-ckpt-optim-fully-reshardable"
        )
