"""What both sides of a comparison share: modules whose weights are in memory only while they run.

A side is built without storage (`WithoutStorage`), and a module gets its weights when it is called
(`load_when_called`). Shapes: b sequences, s tokens, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from step35_patch.tensors.published import Weights
from step35_patch.tensors.table import EMBEDDING
from step35_patch.verify.pieces import vocabulary_blocks


class WithoutStorage(TorchFunctionMode):
    """Parameters and buffers are made on the meta device, whatever device they are asked for on.

    torch.device("meta") does not do this where `step35_patch.cpu` stands around torch's functions,
    and not for those that name a device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, on the meta device if it makes a tensor."""
        kwargs = dict(kwargs or {})
        if func.__name__ in ("empty", "ones", "zeros"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load_when_called(
    module: torch.nn.Module, loads: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype
) -> None:
    """Give a module its parameters and buffers for the time of each call, and no longer.

    Args:
        module: has them without storage.
        loads: reads each of them, by its name in the module.
        dtype: of the parameters; buffers (the router's bias) keep what they are loaded in.
    """
    empty = {name: getattr(module, name) for name in loads}

    def before(module: torch.nn.Module, args: Any) -> None:
        for name, load in loads.items():
            value = load()
            if isinstance(empty[name], torch.nn.Parameter):
                value = torch.nn.Parameter(value.to(dtype), requires_grad=False)
            setattr(module, name, value)

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        for name, value in empty.items():
            setattr(module, name, value)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers, without those of its submodules."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


class Embedding:
    """The rows of the embedding that a few tokens need.

    Args:
        weights: read by blocks of the vocabulary.
        vocabulary: rows of the embedding.
        tokens: [b, s], all that will be asked for; token 0 besides, which stands behind the end of
            a sequence for the MTP layers.
        dtype: of the rows.
    """

    def __init__(self, weights: Weights, vocabulary: int, tokens: Tensor, dtype: torch.dtype):
        self._ids = torch.cat([tokens.flatten(), tokens.new_zeros(1)]).unique()
        rows = []
        for block in vocabulary_blocks(vocabulary):
            own = self._ids[(self._ids >= block.start) & (self._ids < block.stop)]
            if own.numel():
                rows.append(weights.get(EMBEDDING, block)[own - block.start].to(dtype))
        self._rows = torch.cat(rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]."""
        return F.embedding(torch.searchsorted(self._ids, tokens), self._rows)
