"""LoRA adapters as a folder that PEFT loads onto transformers' Step-3.5 (its Step3p7 classes).

AutoBridge's own `save_hf_adapter` writes the published names, of which transformers' classes have
only some, and packs routed experts in another order of columns than PEFT unpacks them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.bridge.models.conversion.peft_bridge import build_adapter_config_dict
from megatron.bridge.models.conversion.utils import unwrap_model
from safetensors.torch import save_file
from torch import Tensor

from step35_patch.config.model import Step35Config
from step35_patch.model.description import runtime_for
from step35_patch.tensors.published import TensorInfo
from step35_patch.tensors.spelling import transformers_place
from step35_patch.tensors.table import tensor_table

# Of what PEFT puts around a model.
_PREFIX = "base_model.model."


class _Pair(NamedTuple):
    """A [r, in] and B [out, r]; of routed experts with all of them in a first dimension."""

    a: Tensor
    b: Tensor


class PeftTensors(NamedTuple):
    """What a PEFT folder holds.

    Attributes:
        state: the tensors, by PEFT's names.
        modules: names of the adapted linear layers, in transformers' model.
        parameters: names of what is adapted and is no linear layer: routers and routed experts.
        ranks: the rank of each of both.
    """

    state: dict[str, Tensor]
    modules: list[str]
    parameters: list[str]
    ranks: dict[str, int]


def save_adapters(
    bridge: Any, model: Any, path: str | Path, peft: Any, *, without_mtp: bool = False
) -> None:
    """Write a model's LoRA adapters as a folder for PEFT; collective, the first rank writes.

    transformers' model has no MTP layers, so that their adapters have no place there.

    Args:
        bridge: the AutoBridge of the model.
        model: its chunks, with adapters.
        path: a folder that does not exist yet.
        peft: Megatron-Bridge's LoRA that made the adapters: its dim and alpha are written.
        without_mtp: leave the MTP layers' adapters out.

    Raises:
        FileExistsError: `path` exists.
        ValueError: there are adapters on MTP layers, and `without_mtp` is False; there are none
            at all; or they can't be exported (`AdapterBridge`).
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target}: expected a folder that does not exist yet")
    exported = {
        name: tensor.detach().clone()
        for name, tensor in bridge.export_adapter_weights(model, show_progress=False)
    }
    runtime = runtime_for(unwrap_model(model)[0].config)
    assert runtime is not None  # noqa: S101  the export refuses other models
    tensors = peft_tensors(exported, runtime.config, without_mtp=without_mtp)
    if torch.distributed.get_rank() == 0:
        source = getattr(bridge.hf_pretrained, "model_name_or_path", None)
        document = build_adapter_config_dict(
            peft,
            target_modules=tensors.modules,
            target_parameters=tensors.parameters,
            base_model_name_or_path=source and str(source),
            rank_pattern={name: r for name, r in tensors.ranks.items() if r != peft.dim},
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        # It appears as a whole or not at all.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            whole = Path(folder, target.name)
            whole.mkdir()
            (whole / "adapter_config.json").write_text(json.dumps(document, indent=2))
            save_file(tensors.state, whole / "adapter_model.safetensors")
            whole.rename(target)
    torch.distributed.barrier()


def peft_tensors(
    exported: dict[str, Tensor], config: Step35Config, *, without_mtp: bool
) -> PeftTensors:
    """Adapters by published names, as `export_adapter_weights` has them, for PEFT.

    Raises:
        ValueError: as `save_adapters`.
    """
    pairs: dict[str, list[_Pair]] = {}
    parameters, of_mtp = [], []
    for row in tensor_table(config, "headwise"):
        for tensor in row.published:
            stem = tensor.name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" not in exported:
                continue
            if row.layer is not None and row.layer.is_mtp:
                of_mtp.append(tensor.name)
                continue
            pair = _Pair(*(exported[f"{stem}.lora_{letter}.weight"] for letter in "AB"))
            info = TensorInfo(tensor.name, tensor.shape, "F32")
            name = transformers_place(info).name
            # Of gate and up, in their order, one after the other.
            pairs.setdefault(name, []).append(pair)
            if (row.is_expert or row.path == "mlp.router.weight") and name not in parameters:
                parameters.append(name)
    if of_mtp and not without_mtp:
        raise ValueError(
            "without_mtp: expected True, since transformers' model has no MTP layers, found False "
            "and adapters of\n  "
            + "\n  ".join(of_mtp)
            + "\nSet it to leave them out, or export them by AutoBridge's export_adapter_weights."
        )
    if not pairs:
        raise ValueError("model: expected LoRA adapters on its decoder layers, found none")
    state: dict[str, Tensor] = {}
    ranks = {}
    for name, parts in pairs.items():
        a, b = _packed(parts)
        ranks[name if name in parameters else name.removesuffix(".weight")] = parts[0].a.shape[-2]
        stem = _PREFIX + _module(name, pairs)
        state |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    modules = [name for name in ranks if name not in parameters]
    return PeftTensors(state, modules, parameters, ranks)


def _module(name: str, adapted: dict[str, list[_Pair]]) -> str:
    """The module whose adapter PEFT calls a tensor's.

    Around a module with two adapted parameters it puts two wrappers, the first parameter's inside.
    """
    stem, _, last = name.rpartition(".")
    if last == "weight":
        return stem
    of_module = [other for other in adapted if other.rpartition(".")[0] == stem]
    return f"{stem}.base_layer" if name != of_module[-1] else stem


def _packed(parts: list[_Pair]) -> _Pair:
    """One pair of what stands in one tensor, in two dimensions."""
    a = parts[0].a
    b = torch.cat([part.b for part in parts], dim=-2)
    if b.dim() == 2:
        return _Pair(a.contiguous(), b.contiguous())
    # Experts below each other in A; in B's columns the experts of one of r stand together.
    whole = a.expand(b.shape[0], -1, -1)
    return _Pair(whole.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous())
