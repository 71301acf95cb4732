"""What is exported of adapters, and the formulas that it is held to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from step35_patch import Step35Config
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.spelling import transformers_place

# Of all adapters here.
ALPHA, DIM = 8, 4


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


class Adapter:
    """What is exported of one published tensor's adapter."""

    def __init__(self, exported: dict[str, torch.Tensor], name: str):
        stem = name.removesuffix(".weight")
        self.a, self.b = (exported.get(f"{stem}.lora_{letter}.weight") for letter in "AB")
        self.lengths = exported.get(f"{stem}.lora_magnitude_vector")
        assert (self.a is None) == (self.b is None), name

    @property
    def scale(self) -> float:
        return ALPHA / self.a.shape[-2]

    def direction(self, weight: torch.Tensor) -> torch.Tensor:
        """W + alpha / dim * B A, of each expert's part if there are several."""
        return weight if self.a is None else weight + self.scale * (self.b @ self.a)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        whole = self.direction(weight)
        return whole if self.lengths is None else self.by_row(whole) * whole

    def by_row(self, whole: torch.Tensor) -> torch.Tensor:
        """What the rows are multiplied by: [rows, 1]."""
        return (self.lengths / whole.square().sum(1).sqrt())[:, None]

    def gradients(self, weight: torch.Tensor, of_merged: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of A, B and the lengths, from that of the merged weight, by PEFT's names.

        The length of W + B A is a constant to DoRA.
        """
        found, of_direction = {}, of_merged
        if self.lengths is not None:
            whole = self.direction(weight)
            of_direction = self.by_row(whole) * of_merged
            unit = whole / whole.square().sum(1, keepdim=True).sqrt()
            found["lora_magnitude_vector"] = (of_merged * unit).sum(1)
        found["lora_A.weight"] = self.scale * self.b.mT @ of_direction
        found["lora_B.weight"] = self.scale * of_direction @ self.a.mT
        return found


def check_folder(folder: Path, exported: dict[str, torch.Tensor], config: Step35Config) -> None:
    """B A of each adapter in a folder for PEFT, multiplied as PEFT does, is the model's."""
    state = load_file(folder / "adapter_model.safetensors")
    document = json.loads((folder / "adapter_config.json").read_text())
    targets = {*document["target_modules"], *document.get("target_parameters", ())}
    found = set()
    for info in published_tensors(config.without_mtp()):
        adapter = Adapter(exported, info.name)
        if adapter.a is None:
            continue
        expected = adapter.scale * (adapter.b @ adapter.a)
        place = transformers_place(info)
        name = place.name.removesuffix(".weight")
        target = place.name if name.endswith("mlp.gate") else name
        found.add(target)
        rank = document["rank_pattern"].get(target, document["r"])
        where = name
        if len(info.shape) == 3:  # gate and up have the inner of two wrappers around the experts
            experts, _, last = name.rpartition(".")
            both = f"{experts}.down_proj" in targets and last == "gate_up_proj"
            where = f"{experts}.base_layer" if both else experts
        a, b = (state[f"base_model.model.{where}.lora_{letter}.weight"] for letter in "AB")
        if len(info.shape) == 3:
            a, b = a.reshape(len(expected), rank, -1), b.reshape(len(b), rank, len(expected))
            delta = torch.einsum("o r e, e r i -> e o i", b, a)
        else:
            delta = b @ a
        rows = slice(place.first_row, place.first_row + info.shape[-2])
        scaled = document["lora_alpha"] / rank * delta[..., rows, :]
        assert close(scaled, expected), info.name
        if adapter.lengths is not None:
            magnitudes = state[f"base_model.model.{name}.lora_magnitude_vector"]
            assert torch.equal(magnitudes, adapter.lengths), info.name
    assert found == targets
    assert len(state) == (3 if document["use_dora"] else 2) * len(targets)


def check_gradients(
    found: dict[str, torch.Tensor],
    of_merged: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    exported: dict[str, torch.Tensor],
) -> None:
    """The adapters' gradients are what those of a model with merged weights amount to.

    Args:
        found: the gradients, by the names of what is exported.
        of_merged: of the merged weights, by published name.
        weights: the base's.
        exported: the adapters.
    """
    expected: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        adapter = Adapter(exported, name)
        if adapter.a is not None:
            stem = name.removesuffix(".weight")
            for part, gradient in adapter.gradients(weight, of_merged[name]).items():
                expected[f"{stem}.{part}"] = gradient
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        # What several published tensors, or all experts, have in common is trained by all.
        same = [
            other
            for other in (expected if name.endswith("lora_A.weight") else [name])
            if _layer(other) == _layer(name) and torch.equal(exported[other], exported[name])
        ]
        whole = sum(expected[other] for other in same)
        if whole.dim() == 3 and torch.equal(exported[name][0], exported[name][1]):
            whole = whole.sum(0, keepdim=True).expand_as(whole)
        # Of a whole layer's gradients, sums of 48 tokens' in another order.
        assert (gradient - whole).abs().max() < 1e-4 * whole.abs().max(), name


def _layer(name: str) -> list[str]:
    return name.split(".")[:3]
