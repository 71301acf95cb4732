"""LoRA adapters as a folder that PEFT loads onto transformers' Step-3.5 (its Step3p7 classes).

AutoBridge's own `save_hf_adapter` writes the published names, of which transformers' classes have
only some, and packs routed experts in another order of columns than PEFT unpacks them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
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


class _Part(NamedTuple):
    """A [r, in] and B [out, r]; of routed experts with all of them in a first dimension.

    Where its rows begin in the tensor that they are stored in, and DoRA's magnitudes [out].
    """

    a: Tensor
    b: Tensor
    first_row: int
    lengths: Tensor | None


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
        peft: Megatron-Bridge's LoRA or DoRA, or Step35CanonicalLoRA, that made the adapters: its
            dim and alpha are written.
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
    assert runtime is not None  # noqa: S101  # nosec B101  # the export refuses others
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
    parts: dict[str, list[_Part]] = {}
    rows_of = {}
    parameters, of_mtp = [], []
    for row in tensor_table(config, "headwise"):
        for tensor in row.published:
            stem = tensor.name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" not in exported:
                continue
            if row.layer is not None and row.layer.is_mtp:
                of_mtp.append(tensor.name)
                continue
            a, b = (exported[f"{stem}.lora_{letter}.weight"] for letter in "AB")
            place = transformers_place(TensorInfo(tensor.name, tensor.shape, "F32"))
            name, rows_of[place.name] = place.name, place.shape[-2]
            lengths = exported.get(f"{stem}.lora_magnitude_vector")
            parts.setdefault(name, []).append(_Part(a, b, place.first_row, lengths))
            if (row.is_expert or row.path == "mlp.router.weight") and name not in parameters:
                parameters.append(name)
    if of_mtp and not without_mtp:
        raise ValueError(
            "without_mtp: expected True, since transformers' model has no MTP layers, found False "
            "and adapters of\n  "
            + "\n  ".join(of_mtp)
            + "\nSet it to leave them out, or export them by AutoBridge's export_adapter_weights."
        )
    if not parts:
        raise ValueError("model: expected LoRA adapters on its decoder layers, found none")
    state: dict[str, Tensor] = {}
    ranks = {}
    for name, found in parts.items():
        a, b = _as_one(found, rows_of[name])
        ranks[name if name in parameters else name.removesuffix(".weight")] = a.shape[-2]
        a, b = _without_experts(a, b)
        stem = _PREFIX + _module(name, parts)
        state |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        if (lengths := found[0].lengths) is not None:
            state[f"{stem}.lora_magnitude_vector"] = lengths
    modules = [name for name in ranks if name not in parameters]
    return PeftTensors(state, modules, parameters, ranks)


def _module(name: str, adapted: Iterable[str]) -> str:
    """The module whose adapter PEFT calls a tensor's.

    Around a module with two adapted parameters it puts two wrappers, the first parameter's inside.
    """
    stem, _, last = name.rpartition(".")
    if last == "weight":
        return stem
    of_module = [other for other in adapted if other.rpartition(".")[0] == stem]
    return f"{stem}.base_layer" if name != of_module[-1] else stem


def _as_one(parts: list[_Part], rows: int) -> tuple[Tensor, Tensor]:
    """A and B of a stored tensor of some rows, in which adapted parts stand.

    Parts with an A of their own each have their own columns of B, so that the rank is the sum of
    theirs. PEFT divides alpha by it: each part's B is taken that much larger.
    """
    first = parts[0].a
    if all(torch.equal(part.a, first) for part in parts):
        a, times = first, 1.0
    else:
        a = torch.cat([part.a for part in parts], dim=-2)
        times = a.shape[-2] / first.shape[-2]
    b = parts[0].b.new_zeros(*parts[0].b.shape[:-2], rows, a.shape[-2])
    column = 0
    for part in parts:
        rank, own = part.a.shape[-2], slice(part.first_row, part.first_row + part.b.shape[-2])
        b[..., own, column : column + rank] = times * part.b
        column += rank if a is not first else 0
    return a, b


def _without_experts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A pair in two dimensions, as PEFT has it."""
    if b.dim() == 2:
        return a.contiguous(), b.contiguous()
    # Experts below each other in A; in B's columns the experts of one of r stand together.
    whole = a.expand(b.shape[0], -1, -1)
    return whole.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()
