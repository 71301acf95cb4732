"""One rank of `step35-patch verify --gradients`: a training script, and its first gradients kept.

    torchrun ... -m step35_patch.verify.gradient_rank SCRIPT HF_DIR OUT MEGATRON_ARGUMENTS

The script's model starts from the weights of HF_DIR, and what `finalize_model_grads` makes of the
gradients is written to OUT before the optimizer sees it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main(script: str, hf_dir: str, out: str) -> None:
    """Run it to its end.

    Args:
        script: `examples/pretrain_step35.py`; its own arguments are in sys.argv.
        hf_dir: a folder in the published layout, whose config is the script's.
        out: a folder for each rank's gradients.
    """
    spec = importlib.util.spec_from_file_location("pretrain_step35", script)
    if spec is None or spec.loader is None:
        raise ImportError(f"{script}: expected a Python file")
    training: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    training.model_provider = _loaded(training.model_provider, hf_dir)

    from megatron.training import training as loop

    loop.finalize_model_grads = _kept(loop.finalize_model_grads, Path(out))
    training.main()


def _loaded(provide: Callable[..., Any], hf_dir: str) -> Callable[..., Any]:
    """A model provider whose models have the weights of a folder."""

    def model_provider(*args: Any, **kwargs: Any) -> Any:
        from step35_patch.checkpoint import load_hf_weights

        model = provide(*args, **kwargs)
        load_hf_weights(model, hf_dir)
        return model

    return model_provider


def _kept(finalize: Callable[..., Any], out: Path) -> Callable[..., Any]:
    """`finalize_model_grads`, after which the gradients are written."""

    def finalize_model_grads(model: list[Any], *args: Any, **kwargs: Any) -> None:
        from safetensors.torch import save_file

        from step35_patch.verify.live_gradients import published_gradients

        finalize(model, *args, **kwargs)
        gradients = published_gradients(model)
        whole = {name: tensor.contiguous() for name, tensor in gradients.items()}
        save_file(whole, out / f"rank-{torch.distributed.get_rank()}.safetensors")

    return finalize_model_grads


if __name__ == "__main__":
    own = sys.argv[1:4]
    sys.argv = [own[0], *sys.argv[4:]]
    main(*own)
