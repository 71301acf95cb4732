"""Where Megatron's defaults are not the authors' recipe: docs/recipes.md as a table.

What is a user's choice is no problem of a launch; it is named, so that it was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from step35_patch.config.model import Step35Config
from step35_patch.model.named_options import differences


@dataclass(frozen=True, slots=True)
class RecipeOption:
    """An option whose default is another one than the authors'.

    Attributes:
        names: the argument, by any of its names in the tested releases.
        authors: what they train with.
        muon: whether it counts with a Muon optimizer only.
    """

    names: tuple[str, ...]
    authors: object
    muon: bool = False


RECIPE: tuple[RecipeOption, ...] = (
    RecipeOption(("weight_decay",), 0.1),
    RecipeOption(("step35_decay_1d",), True),
    RecipeOption(("adam_beta2",), 0.95),
    RecipeOption(("lr_decay_style",), "cosine"),
    RecipeOption(("muon_momentum",), 0.95, muon=True),
    RecipeOption(("muon_nesterov", "muon_use_nesterov"), True, muon=True),
    RecipeOption(("muon_coefficient_type",), "polar_express", muon=True),
    RecipeOption(("muon_num_ns_steps",), 6, muon=True),
    RecipeOption(("muon_scale_mode",), "spectral", muon=True),
    RecipeOption(("muon_extra_scale_factor",), 0.2, muon=True),
)


def recipe_notes(args: Any, given: Mapping[str, Any], config: Step35Config) -> Iterator[str]:
    """A line for each choice that nobody made, and for each that changes the model.

    Args:
        args: parsed, with the config's shapes filled in.
        given: those that stand on the command line.
        config: the model.
    """
    is_muon = "muon" in args.optimizer
    for row in RECIPE:
        name = next((name for name in row.names if hasattr(args, name)), None)
        if name is None or name in given or (row.muon and not is_muon):
            continue
        if (found := getattr(args, name)) != row.authors:
            option = f"--{name.replace('_', '-')}"
            default = "" if row.authors is True else f", and {found} by Megatron's default"
            authors = "it" if row.authors is True else row.authors
            yield f"{option} is not given{default}; the authors train with {authors}"
    if is_muon and "muon_tp_mode" not in given and args.tensor_model_parallel_size > 1:
        yield (
            "--muon-tp-mode is not given, and blockwise by Megatron's default: each rank's block "
            "of a matrix is orthogonalized by itself; duplicated and distributed take it as a whole"
        )
    for difference in differences(args):
        yield f"differs from the published model: {difference}"
    if args.seq_length is not None:
        windows = [plan.window_size[0] + 1 for plan in config.layers if plan.window_size]
        if windows and args.seq_length < min(windows):
            yield (
                f"--seq-length {args.seq_length} is below the sliding window of {min(windows)} "
                "tokens: no layer's window is trained"
            )
        scaling = next((p.rope_scaling for p in config.layers if p.rope_scaling), None)
        if scaling and args.seq_length > scaling.original_max_position_embeddings:
            yield (
                f"--seq-length {args.seq_length} is beyond RoPE's original "
                f"{scaling.original_max_position_embeddings} tokens: the full-attention layers are "
                f"scaled ({scaling.rope_type}, factor {scaling.factor:g}), as the config says"
            )
    if not (args.load or getattr(args, "pretrained_checkpoint", None)):
        yield "neither --load nor --pretrained-checkpoint is given: the run starts from random ones"
