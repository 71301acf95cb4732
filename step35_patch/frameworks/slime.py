"""What slime calls by its dotted name: a model provider, and a hook for its weight synchronisation.

Megatron-Core is imported when it is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from step35_patch import settings as process
from step35_patch.frameworks.weights import WholeTensors
from step35_patch.model.description import Step35Runtime, from_settings
from step35_patch.settings import Step35ActivationError

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from torch import Tensor

# Where slime turns one gathered weight into Hugging Face's, chosen by the model's name.
_SLIME_WEIGHTS = "slime.backends.megatron_utils.megatron_to_hf"
_CONVERT = "_convert_to_hf_core"
# In a model's name as slime spells it, lower-case and without separators.
_OUR_NAMES = ("step3p5", "step3p7", "step35")


def slime_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> GPTModel:
    """This process's part of the Step-3.5 model of STEP35_CONFIG (or `step35_patch.activate`).

    `--custom-model-provider-path step35_patch.frameworks.slime_provider`. Where Megatron's
    arguments are set, as slime sets them, the model is built with them. Elsewhere it is built with
    the initialised groups' sizes and a TransformerConfig's defaults.

    Args:
        pre_process: with the embedding (first pipeline stage).
        post_process: with the output layer (last pipeline stage).
        vp_stage: the model chunk under virtual pipeline parallelism.

    Returns:
        As `Step35ModelProvider.provide`.

    Raises:
        Step35ActivationError: no config is given, or it cannot be used.
        ValueError: Megatron's arguments contradict the config; all conflicts are listed.
    """
    settings = _asked_for("slime_provider")
    args = _megatron_arguments()
    part: dict[str, Any] = {
        "pre_process": pre_process,
        "post_process": post_process,
        "vp_stage": vp_stage,
    }
    if args is None:
        from step35_patch.model.provider import Step35ModelProvider

        provider = Step35ModelProvider.of(
            settings.config,
            gate_layout=settings.gate_layout,
            window=settings.window,
            padded_logits=settings.padded_logits,
            **_sizes(),
        )
        return provider.provide(**part)
    # By the module, whose function the hook is around.
    arguments = importlib.import_module("megatron.training.arguments")
    from step35_patch.model.gpt import build_gpt_model

    config = arguments.core_transformer_config_from_args(args)
    return build_gpt_model(
        config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        **part,
    )


def slime_init(args: Any) -> None:
    """Let slime send a Step-3.5 model's weights: `--custom-megatron-init-path` calls this.

    slime picks the function for a model by its name, from a list of its own without Step-3.5. For
    other models, and with `--megatron-to-hf-mode bridge`, nothing changes. The routed experts of a
    layer are sent together, as they are published, when the last of them has come.

    Args:
        args: slime's.

    Raises:
        Step35ActivationError: no config is given, or it cannot be used.
        ValueError: experts are cut over ranks as modules of their own, which slime does not count.
        RuntimeError: this slime has no such function.
    """
    runtime = from_settings(_asked_for("slime_init"))
    if args.expert_model_parallel_size > 1 and not args.moe_grouped_gemm:
        raise ValueError(
            "--moe-grouped-gemm: expected it with --expert-model-parallel-size "
            f"{args.expert_model_parallel_size}: without it slime takes each rank's first expert "
            "for the model's first; give it"
        )
    module = importlib.import_module(_SLIME_WEIGHTS)
    original = getattr(module, _CONVERT, None)
    if original is None:
        raise RuntimeError(
            f"{_SLIME_WEIGHTS}: expected {_CONVERT}, found no such function; use "
            "--megatron-to-hf-mode bridge, or look for a newer step35-patch"
        )
    if not isinstance(original, _SlimeWeights):
        setattr(module, _CONVERT, _SlimeWeights(original, runtime))


class _SlimeWeights:
    """Stands for slime's function.

    Args:
        original: slime's own, for other models.
        runtime: The Step-3.5 model.
    """

    def __init__(self, original: Callable[..., Any], runtime: Step35Runtime):
        self.original = original
        self.whole = WholeTensors(runtime)

    def __call__(self, args: Any, model_name: str, name: str, param: Tensor) -> Any:
        """As slime's: the (name, tensor) pairs of one gathered weight."""
        plain = model_name.lower().replace("_", "").replace("-", "").replace(".", "")
        if not any(ours in plain for ours in _OUR_NAMES):
            return self.original(args, model_name, name, param)
        return self.whole(name, param)


def _asked_for(function: str) -> process.Settings:
    settings = process.active()
    if settings is None:
        raise Step35ActivationError(
            f"{function}: expected a Step-3.5 config, found none; set STEP35_CONFIG to the path of "
            "a config.json, or of a folder with one, in the environment of every worker"
        )
    return settings


def _megatron_arguments() -> Any:
    """Megatron's arguments, or None where they are not set."""
    module = sys.modules.get("megatron.training.global_vars")
    return None if module is None else module._GLOBAL_ARGS


def _sizes() -> dict[str, Any]:
    """The parallel sizes of Megatron-Core's initialised groups, by TransformerConfig's fields.

    With sequence parallelism, without which Megatron-Core does not train MoE layers under tensor
    parallelism.
    """
    import torch
    from megatron.core import parallel_state as groups

    return {
        "pipeline_dtype": torch.float32,
        "sequence_parallel": groups.get_tensor_model_parallel_world_size() > 1,
        "tensor_model_parallel_size": groups.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": groups.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            groups.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": groups.get_context_parallel_world_size(),
        "expert_model_parallel_size": groups.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": groups.get_expert_tensor_parallel_world_size(),
    }
