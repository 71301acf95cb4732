"""The norms' `_extra_state`, which one implementation of Megatron-Core's asks a checkpoint for.

All modules of Transformer Engine have an `_extra_state`, for the scales of FP8, and Megatron-Core
saves and loads each as an object of its own. A norm multiplies no matrices, so that its state is
empty in every precision; the local implementation's norms have none. A checkpoint without them is
complete: where one lacks them, the model keeps its own. The states of linear layers, which may hold
data, are asked for as ever, and saved by both implementations.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import Tensor

from step35_patch.config.model import Step35Config
from step35_patch.tensors.megatron import norm_extra_states


class NormExtraState(ShardedObject):
    """The empty `_extra_state` of a norm, which a checkpoint may lack."""


def mark_norms(sharded: dict[str, Any], config: Step35Config, prefix: str = "") -> None:
    """Exchange the norms' empty states in a model's sharded state dict for `NormExtraState`s.

    Args:
        sharded: what GPTModel.sharded_state_dict returns; changed in place.
        config: of the model.
        prefix: of all its keys, as GPTModel.sharded_state_dict got it.
    """
    keys = {prefix + key for key in norm_extra_states(config)}
    for name, value in sharded.items():
        if not isinstance(value, ShardedObject) or value.unique_key not in keys:
            continue
        if isinstance(value.data, Tensor) and value.data.numel() == 0:
            sharded[name] = NormExtraState(**vars(value))


def without_absent(sharded: Any, checkpoint_dir: Any, sharded_strategy: Any = None) -> Any:
    """A sharded state dict that asks for no norm's state that a checkpoint lacks.

    Args:
        sharded: what `dist_checkpointing.load` got; returned as it is if it has no norm's states.
        checkpoint_dir: the same.
        sharded_strategy: the same.
    """
    if not any(isinstance(value, NormExtraState) for value in nested_values(sharded)):
        return sharded
    stored = load_sharded_metadata(str(checkpoint_dir), sharded_strategy).values()
    present = {value.unique_key for value in stored if isinstance(value, ShardedObject)}

    def own_where_absent(value: Any) -> Any:
        if isinstance(value, NormExtraState) and value.unique_key not in present:
            return LocalNonpersistentObject(value.data)
        return value

    return dict_list_map_outplace(own_where_absent, sharded)
