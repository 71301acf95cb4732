"""`step35-patch generate`: what a checkpoint says, by Megatron-Core's static engine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_patch.commands.acceptance import add_acceptance
from step35_patch.commands.upstream_notices import without_upstream_notices
from step35_patch.settings import WINDOWS

if TYPE_CHECKING:
    import torch

    from step35_patch.config.model import Step35Config
    from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint

_CONFIG = "config.json"
_DTYPES = ("bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch generate`."""
    parser.add_argument(
        "weights",
        metavar="CKPT|HF_DIR",
        help="a Megatron checkpoint, as --load takes it or the folder of one iteration; or a "
        "folder in the published layout",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        dest="prompts",
        metavar="TEXT",
        help="what to continue, as it stands; several are one batch",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="of each prompt's continuation, unless the text ends before (%(default)s)",
    )
    parser.add_argument(
        "--hf-dir",
        metavar="HF_DIR",
        help="the folder of the tokenizer, and for CKPT of the model's config.json (default: that "
        "of the weights)",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="what is computed in (default: the config's)"
    )
    parser.add_argument(
        "--window",
        choices=WINDOWS,
        help=f"a sliding layer's query sees W keys, or W + 1 (default: as CKPT was trained, else "
        f"{WINDOWS[0]})",
    )
    parser.add_argument(
        "--pipeline-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="under torchrun (%(default)s); the processes of a stage are tensor-parallel",
    )
    add_acceptance(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate, and print prompts with their continuations.

    Args:
        options: what a parser with `add_arguments` parsed.

    Returns:
        The exit status: 0, or 2 if nothing could be generated.
    """
    try:
        with without_upstream_notices():
            _generate(options)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _generate(options: argparse.Namespace) -> None:
    from step35_patch.config.model import Step35Config

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, found {options.max_new_tokens}")
    weights = Path(options.weights)
    if not weights.is_dir():
        raise ValueError(f"{weights}: expected a folder of weights, found none")
    published = (weights / _CONFIG).is_file()
    if not published and options.hf_dir is None:
        raise ValueError(
            f"--hf-dir: expected the folder of the model's {_CONFIG} and tokenizer, because "
            f"{weights} has no {_CONFIG}, found none"
        )
    config = Step35Config.from_pretrained(weights if published else options.hf_dir)
    tokenizer = _Tokenizer(Path(options.hf_dir or weights))
    for prompt in options.prompts:
        _check_prompt(prompt, tokenizer.tokenize(prompt), options.max_new_tokens, config)

    checkpoint, window = None, options.window
    if not published:
        from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint

        checkpoint = MegatronCheckpoint(weights, config)
        checkpoint.refuse_drifted_gates()
        window = window or getattr(checkpoint.folder.common_args(), "step35_window", None)
    with contextlib.redirect_stdout(sys.stderr):  # what is said of the model is no answer
        model = _model(options, config, window or WINDOWS[0], checkpoint)
        continuations = _continue(model, options.prompts, options.max_new_tokens, tokenizer)

    import torch

    if torch.distributed.get_rank() == 0:
        for prompt, tokens in zip(options.prompts, continuations, strict=True):
            _print(prompt, tokens, options.max_new_tokens, tokenizer)


class _Tokenizer:
    """A folder's tokenizer, by transformers, as Megatron-Core's controller asks for one.

    Args:
        folder: with tokenizer.json or its kin.

    Attributes:
        eod: the token that ends a text; -1 if there is none.
        bos: None, so that the controller leaves a text's first token alone.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder has no tokenizer that transformers can load.
    """

    bos = None

    def __init__(self, folder: Path):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "generate reads the tokenizer with transformers, which is not installed: pip "
                "install 'step35-patch[reference]'"
            ) from error
        if not any(folder.glob("tokenizer*")):
            raise ValueError(
                f"{folder}: expected a tokenizer (tokenizer.json, tokenizer_config.json), found "
                "none; name the folder that has the model's with --hf-dir"
            )
        try:
            # A folder of this machine: nothing is downloaded, and no code of it is run.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(  # nosec B615
                folder, local_files_only=True
            )
        except Exception as error:  # it can be anything
            raise ValueError(
                f"{folder}: expected a tokenizer that transformers can load, found {error!r}"
            ) from error
        end = self._tokenizer.eos_token_id
        self.eod: int = -1 if end is None else end

    def tokenize(self, text: str) -> list[int]:
        """The text's tokens, with those that the tokenizer puts around a text."""
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        return tokens

    def detokenize(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of some tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text


def _check_prompt(prompt: str, tokens: list[int], new: int, config: Step35Config) -> None:
    if not tokens:
        raise ValueError(f"--prompt: expected text, found {prompt!r}, which has no tokens")
    if max(tokens) >= config.vocab_size:
        raise ValueError(
            f"--prompt {prompt!r}: expected tokens below the model's vocab_size "
            f"{config.vocab_size}, found {max(tokens)}: the tokenizer is another model's"
        )
    longest = config.max_position_embeddings
    if len(tokens) + new > longest:
        raise ValueError(
            f"--prompt and --max-new-tokens: expected at most max_position_embeddings {longest} "
            f"tokens together, found {len(tokens)} and {new}"
        )


def _model(
    options: argparse.Namespace,
    config: Step35Config,
    window: str,
    checkpoint: MegatronCheckpoint | None,
) -> torch.nn.Module:
    """This process's part of the model, with its weights; the MTP layers are left out."""
    import torch

    from step35_patch import cpu

    if not torch.cuda.is_available():
        cpu.install()  # before Megatron-Core is imported
    from megatron.core import parallel_state

    from step35_patch.checkpoint import load_hf_weights
    from step35_patch.model.live_weights import entries_of
    from step35_patch.model.provider import Step35ModelProvider

    stages = options.pipeline_model_parallel_size
    tensor_parallel = _meet(stages)
    dtype = getattr(torch, options.dtype or _dtype_of(config))
    provider = Step35ModelProvider.from_hf(
        options.weights if checkpoint is None else options.hf_dir,
        window=window,
        mtp_num_layers=None,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
    )
    model: torch.nn.Module = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if checkpoint is None:
        load_hf_weights(
            model,
            options.weights,
            accept_rounded_router_bias=options.accept_rounded_router_bias,
            dequantize_fp8=options.dequantize_fp8,
        )
    else:
        with torch.no_grad():
            for entry in entries_of(model, provider.step35):
                entry.parameter.copy_(entry.load(checkpoint))
    return model


def _dtype_of(config: Step35Config) -> str:
    found = config.to_dict().get("torch_dtype")
    return found if found in _DTYPES else _DTYPES[0]


def _meet(stages: int) -> int:
    """Let the processes of torchrun find each other, or this one itself; the tensor-parallel size.

    Raises:
        ValueError: they are no multiple of the stages.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if stages < 1 or processes % stages:
        raise ValueError(
            f"--pipeline-model-parallel-size: expected a divisor of the {processes} processes, "
            f"found {stages}; start more with torchrun --nproc-per-node"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        if "RANK" in os.environ:
            torch.distributed.init_process_group()
        else:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # not in __all__
            torch.distributed.init_process_group(store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(processes // stages, stages)
        model_parallel_cuda_manual_seed(1234)
    return processes // stages


def _continue(
    model: torch.nn.Module, prompts: list[str], new: int, tokenizer: _Tokenizer
) -> list[list[int]]:
    """The tokens that follow each prompt, fewer than `new` where the text ended."""
    from megatron.core.inference import utils
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    longest = max(len(tokenizer.tokenize(prompt)) for prompt in prompts) + new
    context = StaticInferenceContext(len(prompts), longest)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
    greedy = SamplingParams(num_tokens_to_generate=new, top_k=1, termination_id=tokenizer.eod)
    # Releases after 0.17 have it, and the engine never takes it back.
    mode = getattr(utils, "InferenceMode", None)
    with contextlib.nullcontext() if mode is None else mode.active():
        engine = StaticInferenceEngine(controller, legacy=True)
        requests = engine.generate(prompts=prompts, sampling_params=greedy)
    return [request.generated_tokens.tolist() for request in requests]


def _print(prompt: str, tokens: list[int], asked_for: int, tokenizer: _Tokenizer) -> None:
    # The engine leaves the end of a text out.
    how = "the end of the text" if len(tokens) < asked_for else "cut off"
    print(f"{prompt}{tokenizer.detokenize(tokens)}\n[{len(tokens)} tokens, {how}]\n", flush=True)
