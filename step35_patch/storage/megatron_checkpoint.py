"""The weights in a Megatron checkpoint of a Step-3.5 model, under their published names."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from step35_patch.config.comparison import Here, compare
from step35_patch.config.model import Step35Config
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import DTYPES
from step35_patch.storage.torch_dist import TorchDistFolder
from step35_patch.tensors.megatron import (
    Box,
    MegatronTensor,
    Run,
    megatron_tensors,
    published_runs,
)
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.qkv import DriftedGateError, gate_drift
from step35_patch.tensors.table import EMBEDDING_KEY

# Keys of a training checkpoint that hold no weights, and are not read.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine", "common_state", "opt_param_")

# The folder's side of a comparison with the checkpoint's config.
_HERE = Here("in the folder's config.json", "convert to-hf --accept-changed")


class MegatronCheckpoint:
    """A torch_dist checkpoint of any parallel layout, read by published names.

    Only the weights' own bytes are read: an optimizer's state is left alone.

    Args:
        path: What Megatron's --load takes, or the folder of one iteration.
        config: Of its model.
        average_gate: Take the mean of an `expanded` gate's rows of a head where they differ,
            in fp32; they are refused otherwise.
        accept_changed: Names of fields (`step35_patch.config.comparison.MAY_CHANGE`) in which the
            config may differ from the checkpoint's own.

    Attributes:
        config: Of its model.
        average_gate: Whether the mean of a gate's rows is taken.
        accepted: The differences that are accepted, a line each.
        folder: The files.
        gate_layout: `"headwise"` or `"expanded"`, found from the shapes.
        dtype: Of all weights but the routers' biases.
        runs: For each published name, where its elements are in the checkpoint.
        absent: Published names that it lacks because it has fewer MTP layers than the config.

    Raises:
        CheckpointError: Tensors or files are missing, unexpected, truncated or damaged, tensors
            have another shape or dtype, as far as this shows without reading the weights; or the
            checkpoint says that it is of another config, or of this one where a field was
            accepted. All problems are listed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Step35Config,
        *,
        average_gate: bool = False,
        accept_changed: Collection[str] = (),
    ) -> None:
        self.config, self.average_gate = config, average_gate
        self._shapes = {info.name: info.shape for info in published_tensors(config)}
        self.folder = TorchDistFolder(path)
        comparison = compare(self.folder.common_args(), config, accept_changed, _HERE)
        problems, self.accepted = [*comparison.problems], comparison.accepted
        self.gate_layout = self._find_gate_layout()
        self.dtype = self._find_dtype(problems)
        tensors = megatron_tensors(config, self.gate_layout)
        untrained = self._untrained_mtp(tensors)
        runs = published_runs(tensors)
        self.runs = {n: pairs for n, pairs in runs.items() if pairs[0][1].key not in untrained}
        self.absent = tuple(name for name in runs if name not in self.runs)
        tensors = tuple(tensor for tensor in tensors if tensor.key not in untrained)
        problems += self._compare(tensors)
        if problems:
            raise CheckpointError(self.folder.path, problems)
        if problems := self.folder.open(tensor.key for tensor in tensors):
            raise CheckpointError(self.folder.path, problems)

    def _find_gate_layout(self) -> str:
        if self.config.use_head_wise_attn_gate:
            for layout in GATE_LAYOUTS:
                tensors = megatron_tensors(self.config, layout)
                qkv = next(t for t in tensors if t.row.qkv)
                stored = self.folder.tensors.get(qkv.key)
                if stored is not None and stored.shape == qkv.shape:
                    return layout
        return GATE_LAYOUTS[0]

    def _untrained_mtp(self, tensors: tuple[MegatronTensor, ...]) -> set[str]:
        """The keys of the config's last MTP layers, if the checkpoint has nothing of them."""
        keys: set[str] = set()
        for plan in reversed(self.config.layers[self.config.num_hidden_layers :]):
            of_layer = {tensor.key for tensor in tensors if tensor.row.layer == plan}
            if not of_layer.isdisjoint(self.folder.tensors):
                break
            keys |= of_layer
        return keys

    def _find_dtype(self, problems: list[str]) -> torch.dtype:
        """The dtype of the embedding, which all other weights must have too."""
        embedding = self.folder.tensors.get(EMBEDDING_KEY)
        if embedding is None:  # which `_compare` reports
            return torch.float32
        if embedding.dtype not in DTYPES.values():
            expected = "one of " + ", ".join(DTYPES)
            problems.append(f"{embedding.key}: dtype {embedding.dtype}, expected {expected}")
        return embedding.dtype

    def _compare(self, tensors: tuple[MegatronTensor, ...]) -> list[str]:
        stored, problems = self.folder.tensors, []
        for tensor in tensors:
            if (found := stored.get(tensor.key)) is None:
                problems.append(f"{tensor.key}: missing")
                continue
            wanted, shape = tensor.shape, found.shape
            if tensor.is_vocabulary and shape[0] > wanted[0]:  # padded
                shape = (wanted[0], *shape[1:])
            if shape != wanted:
                problems.append(f"{tensor.key}: shape {found.shape}, expected {wanted}")
            dtype = torch.float32 if tensor.is_router_bias else self.dtype
            if found.dtype != dtype:
                problems.append(f"{tensor.key}: dtype {found.dtype}, expected {dtype}")
        known = {tensor.key for tensor in tensors}
        problems += [
            f"{key}: unexpected"
            for key in stored
            if key not in known and not key.startswith(_NOT_WEIGHTS)
        ]
        return problems

    def files(self) -> list[Path]:
        """The files that make up the checkpoint."""
        return self.folder.files()

    def block(self, run: Run, box: Box) -> Tensor:
        """The published elements of a run.

        Args:
            run: Consecutive elements of a published tensor.
            box: Where the checkpoint has them.

        Returns:
            [elements], not to be written to.

        Raises:
            CheckpointError: The bytes are damaged.
        """
        stored = self._rows(box)
        if run.repeat == 1:
            return stored
        rows = stored.view(-1, run.repeat, run.row)
        if self.average_gate:
            # Equal rows stay what they are, whatever rounding a mean would bring.
            same = (rows == rows[:, :1]).all(dim=1)
            mean = rows.float().mean(dim=1).to(rows.dtype)
            return torch.where(same, rows[:, 0], mean).reshape(-1)
        return rows[:, 0].reshape(-1)

    def _rows(self, box: Box) -> Tensor:
        return self.folder.read(box.key, box.offsets, box.sizes).reshape(-1)

    def refuse_drifted_gates(self) -> None:
        """Read the gates of an `expanded` checkpoint, and raise if rows of a head differ.

        Raises:
            DriftedGateError: They do; it has the largest difference of each layer.
        """
        drifted = []
        for name, pairs in self.runs.items():
            found = [
                gate_drift(self._rows(box).view(-1, run.repeat, run.row))
                for run, box in pairs
                if run.repeat > 1
            ]
            if any(found):
                # Not max(), which may lose a NaN.
                drifted.append(f"{name}: by up to {torch.tensor(found).max():.3g}")
        if drifted:
            raise DriftedGateError(
                f"{self.folder.path}: the rows that stand for one row of g_proj differ:\n  "
                + "\n  ".join(drifted)
                + "\nTrained with Megatron-Core's own gate they are no g_proj any more. Their mean "
                "is another model; --average-gate (average_gate=True) takes it."
            )

    def get(self, name: str, *index: int | slice) -> Tensor:
        """A published tensor, or the part that `index` selects along its first dimension.

        Of a drifted gate it is the first row of each head, or the mean: see `refuse_drifted_gates`.

        Args:
            name: Its published name.
            index: Nothing, or one position or range of step 1.

        Returns:
            The tensor on the CPU, without the first dimension if a position was given.

        Raises:
            CheckpointError: The bytes are damaged.
            ValueError: A range has another step.
        """
        pairs = self.runs[name]
        shape = self._shapes[name]
        row = math.prod(shape[1:])
        (rows,) = index or (slice(None),)
        first, last, step = (rows, rows + 1, 1) if isinstance(rows, int) else rows.indices(shape[0])
        if step != 1:
            raise ValueError(f"index: expected a step of 1, found {step}")
        parts = [
            self.block(run, box)[max(0, first * row - run.start) : max(0, last * row - run.start)]
            for run, box in pairs
            if run.start < last * row and run.start + run.num_elements > first * row
        ]
        whole = torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)
        return whole.view(shape[1:] if isinstance(rows, int) else (-1, *shape[1:]))
