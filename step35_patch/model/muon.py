"""Muon, one published matrix at a time.

Muon makes the update of a matrix orthogonal, and so depends on what counts as one matrix. For the
authors that is each published tensor: q, k, v and g apart, gate and up apart, each expert's apart.
Megatron-Core merges them into linear_qkv and linear_fc1, splits the first by head counts that no
sliding layer has, and never splits the second. Here each of its Muon optimizers is handed the
published matrices of a weight one after the other; Newton-Schulz, its scale, and what tensor
parallelism makes of either (`muon_tp_mode`) stay Megatron-Core's.

The rows of an `expanded` gate (`step35_patch.model.attention`) are one g_proj: the first row of
each head is what is trained, and the others get its update, so that they stay equal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from step35_patch.model.live_weights import entries_of
from step35_patch.model.refused_options import Place, missing_for, refused
from step35_patch.model.training_state import inner_optimizer, parts_of, unwrap
from step35_patch.tensors.qkv import join_rows, split_rows
from step35_patch.tensors.table import MadeOf, Row

# A torch optimizer's method that makes the update of one parameter:
# (parameter, direction, **its group's settings) -> update.
Orthogonalize = Callable[..., Tensor]


def check_optimizer(config: Any) -> None:
    """Refuse an optimizer that a Step-3.5 model cannot be trained with.

    Args:
        config: Megatron-Core's OptimizerConfig.

    Raises:
        ValueError: an option that does not go with the model.
        ImportError: a package that it needs is not installed.
    """
    for row, found in refused(config, Place.OPTIMIZER):
        raise ValueError(
            f"OptimizerConfig of Step-3.5: {row.name}: expected "
            f"{' or '.join(map(repr, row.legal))}, found {found!r}; {row.reason}"
        )
    if (missing := missing_for(config.optimizer)) is not None:
        raise ImportError(f"OptimizerConfig: {missing}")


def step35_chunks(model: Iterable[torch.nn.Module]) -> list[Any]:
    """The GPTModels among a model's chunks, wrapped or not, that are Step-3.5's."""
    return [chunk for chunk, _ in map(unwrap, model) if hasattr(chunk, "step35")]


def by_published_matrix(optimizer: Any, chunks: list[Any]) -> None:
    """Let the Muon optimizers in one of Megatron-Core's orthogonalize published matrices.

    Args:
        optimizer: what get_megatron_optimizer made for the model.
        chunks: its `step35_chunks`; without any, nothing is done.

    Raises:
        RuntimeError: a Muon optimizer has a parameter that is no published matrix of a layer.
    """
    inner = [inner_optimizer(part) or part for part in parts_of(optimizer)]
    muons = [muon for muon in inner if hasattr(muon, "orthogonalize")]
    if not (muons and chunks):
        return
    matrices: dict[Tensor, _Matrices] = {}
    for chunk in chunks:
        matrices |= _matrices_of(chunk)
    for muon in muons:
        own = [parameter for group in muon.param_groups for parameter in group["params"]]
        for parameter in own:
            if parameter not in matrices:
                raise RuntimeError(
                    f"Muon has a parameter {list(parameter.shape)} that is no published matrix of "
                    "a Step-3.5 layer; embedding and output matrices, and what is not 2-D, belong "
                    "to the scalar optimizer (--muon-scalar-optimizer)"
                )
        # On the object: another model's optimizer, of the same class, is none of this package's.
        muon.orthogonalize = _ByMatrix(muon.orthogonalize, {p: matrices[p] for p in own})


class _Matrices:
    """The published matrices in one of Megatron-Core's weights, as this rank has them.

    Args:
        row: of the table of tensors.
        tensor_parallel: the number of ranks that it is cut for.
    """

    def __init__(self, row: Row, tensor_parallel: int):
        self.layout = None if row.qkv is None else row.qkv.share(tensor_parallel)
        self.count = len(row.published) if row.made_of is MadeOf.STACKED else 1

    def split(self, weight: Tensor) -> list[Tensor]:
        """[rows, columns] of the weight to those of each matrix."""
        if self.layout is None:
            return list(weight.chunk(self.count))
        return [part for part in split_rows(weight, self.layout) if part is not None]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if self.layout is None:
            return torch.cat(parts)
        q, *g, k, v = parts
        return join_rows(q, g[0] if g else None, k, v, self.layout)


def _matrices_of(model: Any) -> dict[Tensor, _Matrices]:
    """Those of each parameter that Muon may have, and of its fp32 main parameter."""
    found: dict[Tensor, _Matrices] = {}
    for entry in entries_of(model, model.step35):
        if entry.parameter.dim() != 2 or entry.row.is_vocabulary:
            continue
        matrices = _Matrices(entry.row, model.pg_collection.tp.size())
        found[entry.parameter] = matrices
        if (main := getattr(entry.parameter, "main_param", None)) is not None:
            found[main] = matrices
    return found


class _OneMatrix:
    """A parameter as Megatron-Core's Muon sees one of the matrices in it: no merged QKV.

    Its other attributes, of which Muon reads how the parameter is cut, are the parameter's.
    """

    is_qkv = False

    def __init__(self, parameter: Tensor):
        self._parameter = parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)


class _ByMatrix:
    """Stands for a Muon optimizer's `orthogonalize`, which it calls for each published matrix.

    Args:
        orthogonalize: Megatron-Core's, bound to the optimizer.
        matrices: of each of the optimizer's parameters.
    """

    def __init__(self, orthogonalize: Orthogonalize, matrices: dict[Tensor, _Matrices]):
        self.orthogonalize, self.matrices = orthogonalize, matrices

    def __call__(self, parameter: Tensor, direction: Tensor, /, **settings: Any) -> Tensor:
        """The update of a parameter, in its shape and dtype."""
        matrices, matrix = self.matrices[parameter], _OneMatrix(parameter)
        parts = [self.orthogonalize(matrix, part, **settings) for part in matrices.split(direction)]
        return matrices.join(parts)
