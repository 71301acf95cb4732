"""What lies beside a folder's tensors and says what their bytes are: config.json and others.

A folder that is written takes its config and its small files from another, which may be quantised
or of another dtype. Whatever describes stored bytes is said anew here, or left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from step35_patch.config.model import Step35Config
from step35_patch.config.quantization import QUANTIZATION_FIELDS
from step35_patch.storage.errors import CheckpointError
from step35_patch.tensors.published import SAFETENSORS_DTYPES

_DTYPE_FIELDS = ("torch_dtype", "dtype")  # dtype is transformers' newer name

# Files of a folder in the published layout that are not copied to another with other tensors.
_WEIGHTS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5"),
    *("*.npz", "*.msgpack", "*.onnx", "*.onnx_data"),
)
_OF_QUANTIZERS = (
    "quantization_config.json",
    "quantize_config.json",  # GPTQ
    "*quant_config.json",  # AWQ; hf_quant_config.json of ModelOpt
    "quant_model_description*.json",  # msModelSlim
    "quant_log.csv",  # GPTQModel
    "recipe.yaml",  # llm-compressor
    "*scales.json",  # vLLM's kv_cache_scales.json and input_scales.json
    "*imatrix*",
)
# The card of the other weights: their quantisation, their training, their results.
_OF_THE_OTHER_WEIGHTS = ("config.json", "README.md")


def torch_dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype's name in a config's torch_dtype.

    Raises:
        ValueError: Weights do not come in this dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in SAFETENSORS_DTYPES:
        names = ", ".join(f"torch.{known}" for known in SAFETENSORS_DTYPES)
        raise ValueError(f"dtype: expected one of {names}, found {dtype}")
    return name


def config_document(
    config: Step35Config, dtype: torch.dtype, beside: Collection[str] = ()
) -> bytes:
    """The config.json of unquantised weights in a dtype.

    Args:
        config: Of the model; where it was read from, the weights may be other ones.
        dtype: Of the weights, which config.json names as `torch_dtype`.
        beside: The names of the other files in the folder. An entry of `auto_map` stays if the
            file with its code is among them, or is in a repository that the entry names.
    """
    document = _of_plain_weights(config.to_dict(), torch_dtype_name(dtype))
    document.pop("dtype", None)
    document["torch_dtype"] = torch_dtype_name(dtype)
    if isinstance(document.get("auto_map"), dict):
        entries = document.pop("auto_map").items()
        if kept := {name: code for name, code in entries if _is_there(code, beside)}:
            document["auto_map"] = kept
    return (json.dumps(document, indent=2) + "\n").encode()


def _of_plain_weights(value: Any, dtype: str) -> Any:
    """A JSON value without what says that weights are quantised, and with their dtype's name."""
    if isinstance(value, list):
        return [_of_plain_weights(entry, dtype) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        name: dtype
        if name in _DTYPE_FIELDS and isinstance(entry, str)
        else _of_plain_weights(entry, dtype)
        for name, entry in value.items()
        if name not in QUANTIZATION_FIELDS
    }


def _is_there(code: Any, files: Collection[str]) -> bool:
    """Whether an entry of auto_map (module.Class, or several) has its code."""
    names = [name for name in (code if isinstance(code, list) else [code]) if name is not None]
    return all(
        isinstance(name, str) and ("--" in name or f"{name.rpartition('.')[0]}.py" in files)
        for name in names
    )


def index_document(weight_map: dict[str, str], total_bytes: int) -> bytes:
    """The index of a sharded checkpoint."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def files_to_copy(folder: Path) -> list[Path]:
    """Tokenizer, generation config, code and whatever else says nothing of the weights.

    Hidden files and folders are left out. Links are followed to files of the folder, and to those
    that a snapshot in the hub's cache consists of.

    Raises:
        CheckpointError: A link leads elsewhere: whoever made the folder would choose a file of this
            machine, to be published with the output.
    """
    left_out = (*_WEIGHTS, *_OF_QUANTIZERS, *_OF_THE_OTHER_WEIGHTS)
    found = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not any(fnmatch(path.name, pattern) for pattern in left_out)
    )
    own = folder.resolve()
    places = [own]
    if own.parent.name == "snapshots":
        places.append(own.parents[1] / "blobs")
    problems = [
        f"{path.name}: expected a file, or a link to one in the folder or the hub's cache, found a "
        f"link to {path.resolve()}; put a copy in its place"
        for path in found
        if not any(path.resolve().is_relative_to(place) for place in places)
    ]
    if problems:
        raise CheckpointError(folder, problems)
    return found
