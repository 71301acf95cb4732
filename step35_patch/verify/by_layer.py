"""The comparison of `step35_patch.verify.api`, part by part.

Shapes: b sequences, s tokens, h hidden size. Hidden states are [b, s, h] here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.storage.hf_folder import Accepted, HfFolder
from step35_patch.tensors.published import TensorInfo, Weights, layer_tensors, published_tensors
from step35_patch.tensors.table import EMBEDDING, FINAL_NORM, HEAD, mtp_head
from step35_patch.verify.measures import LogitsMeasure, end_to_end_difference, own_difference
from step35_patch.verify.ours import OurSide
from step35_patch.verify.pieces import vocabulary_blocks
from step35_patch.verify.reference import ReferenceSide
from step35_patch.verify.report import LogitsAgreement, Part, Report, layer_kind


class _Tolerance(NamedTuple):
    """What is still agreement.

    Attributes:
        difference: own difference up to which a part agrees.
        near_tie: gap between the scores of two experts up to which rounding may choose between
            them. Scores are sigmoids, computed in float32 from inputs rounded to the dtype.
    """

    difference: float
    near_tie: float


_TOLERANCES = {torch.float32: _Tolerance(1e-4, 1e-5), torch.bfloat16: _Tolerance(5e-2, 2e-2)}


def compare_layers(
    hf_dir: str | os.PathLike[str],
    config: Step35Config,
    source: Weights | None,
    *,
    shape: tuple[int, int],
    seed: int,
    dtype: torch.dtype | None,
    mtp: bool,
    accept_rounded_router_bias: bool,
    dequantize_fp8: bool,
    on_part: Callable[[Part], None] | None,
) -> Report:
    """As `step35_patch.verify.api.compare`, with a checked config and the tokens' shape (b, s)."""
    dtype = dtype or torch.float32
    if dtype not in _TOLERANCES:
        raise ValueError(
            f"dtype: expected one of {', '.join(map(str, _TOLERANCES))}, found {dtype}"
        )
    tokens = _random_tokens(config, shape, seed)
    folder = HfFolder(
        hf_dir,
        config,
        mtp_layers=None if mtp else 0,
        accept=Accepted(accept_rounded_router_bias, dequantize_fp8),
    )
    with torch.no_grad(), _single_process():
        return Comparison(folder, config, source, tokens, dtype, mtp=mtp, on_part=on_part).run()


def _random_tokens(config: Step35Config, shape: tuple[int, int], seed: int) -> Tensor:
    """[b, s] token ids without the config's pad_token_id."""
    generator = torch.Generator().manual_seed(seed)
    pad = config.pad_token_id
    if pad is None or not 0 <= pad < config.vocab_size:
        return torch.randint(config.vocab_size, shape, generator=generator)
    tokens = torch.randint(config.vocab_size - 1, shape, generator=generator)
    return tokens + (tokens >= pad)


@contextlib.contextmanager
def _single_process() -> Iterator[None]:
    """Megatron-Core's groups of one process, initialised for the time being unless they are."""
    ours = not torch.distributed.is_initialized()
    if ours:
        store = HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    groups = not parallel_state.model_parallel_is_initialized()
    try:
        if (size := torch.distributed.get_world_size()) != 1:
            raise RuntimeError(
                f"world size: expected 1, found {size}; compare in a process of its own"
            )
        if groups:
            parallel_state.initialize_model_parallel()
        yield
    finally:
        if groups:
            parallel_state.destroy_model_parallel()
        if ours:
            torch.distributed.destroy_process_group()


class Comparison:
    """Both sides on the same tokens, computed part by part.

    Args:
        folder: the reference's.
        config: the folder's.
        source: our side's weights; None means those of the folder.
        tokens: [b, s].
        dtype: what both sides compute in, one of `_TOLERANCES`.
        mtp: with the MTP layers.
        on_part: called with each part as soon as it is computed.
    """

    def __init__(
        self,
        folder: HfFolder,
        config: Step35Config,
        source: Weights | None,
        tokens: Tensor,
        dtype: torch.dtype,
        *,
        mtp: bool,
        on_part: Callable[[Part], None] | None,
    ):
        self._config, self._source, self._tokens, self._dtype = config, source, tokens, dtype
        self._on_part = on_part
        self._tolerance = _TOLERANCES[dtype]
        self._tensors = {info.name: info for info in published_tensors(config)}
        self._folder = folder
        self._reference = ReferenceSide(config, self._folder, tokens, dtype)
        self._ours = OurSide(folder.path, source or self._folder, tokens, dtype, mtp=mtp)
        decoder = config.num_hidden_layers
        self._decoder_layers = config.layers[:decoder]
        self._mtp_layers = config.layers[decoder:] if mtp else ()
        self._parts: list[Part] = []
        self._logits: list[LogitsAgreement] = []
        self._suspects: tuple[str, ...] = ()

    def run(self) -> Report:
        """Compute both sides to the end; once, because MTP layers have to be called in order."""
        reference, ours = self._reference, self._ours
        expected, own = reference.embedding(self._tokens), ours.embedding(self._tokens)
        differences = own_difference(own, expected, None)
        self._add("embedding", "", [EMBEDDING], differences, end_to_end_difference(own, expected))
        for plan in self._decoder_layers:
            before = expected
            expected, gaps = reference.layer(plan.index, before)
            own, given = ours.layer(plan.index, own, before)
            differences = own_difference(given, expected, before)
            self._add_layer(plan, differences, end_to_end_difference(own, expected), gaps)
        before, expected = expected, reference.norm(expected)
        own, given = ours.norm(own, before)
        self._add_logits(HEAD, [FINAL_NORM], own, given, expected)
        for depth, plan in enumerate(self._mtp_layers):
            before, expected = expected, reference.mtp_layer(depth, expected)
            own, given = ours.mtp_layer(depth, own, before)
            differences = own_difference(given, expected, None)
            self._add_layer(plan, differences, end_to_end_difference(own, expected))
            self._add_logits(mtp_head(plan), [], own, expected, expected)
        return Report(
            tuple(self._parts), tuple(self._logits), self._tolerance.difference, self._suspects
        )

    def _add_layer(
        self, plan: LayerPlan, differences: Tensor, end_to_end: float, gaps: Tensor | None = None
    ) -> None:
        tensors = [info.name for info in layer_tensors(self._config, plan)]
        tensors = [name for name in tensors if name != mtp_head(plan)]  # compared by itself
        self._add(f"layer {plan.index}", layer_kind(plan), tensors, differences, end_to_end, gaps)

    def _add_logits(
        self, matrix: str, after: list[str], own: Tensor, given: Tensor, expected: Tensor
    ) -> None:
        """Add an output matrix, and the logits that it makes of normed states [b, s, h].

        Args:
            matrix: its published name.
            after: what else the part is made of, and is computed before.
            own: our side's states.
            given: ours, of what the reference's part was given.
            expected: the reference's.
        """
        own, given, expected = (states.flatten(0, 1) for states in (own, given, expected))
        measure = LogitsMeasure(len(own))
        for rows in vocabulary_blocks(self._config.vocab_size):
            theirs = self._folder.get(matrix, rows).to(self._dtype)
            ours = (self._source or self._folder).get(matrix, rows).to(self._dtype)
            measure.add(
                F.linear(own, ours).float(),
                F.linear(given, ours).float(),
                F.linear(expected, theirs).float(),
                rows.start,
            )
        logits = measure.agreement(matrix)
        kind = f"after {', '.join(after)}" if after else ""
        self._add(matrix, kind, [*after, matrix], measure.own_difference, logits.relative)
        self._logits.append(logits)

    def _add(
        self,
        name: str,
        kind: str,
        tensors: list[str],
        differences: Tensor,
        end_to_end: float,
        gaps: Tensor | None = None,
    ) -> None:
        """Add a part.

        Args:
            name: `Part.name`.
            kind: `Part.kind`.
            tensors: the published names of what it is made of.
            differences: [b * s], the difference of each position.
            end_to_end: `Part.end_to_end`.
            gaps: [b * s], between the scores of experts; None without any.
        """
        near = torch.zeros_like(differences, dtype=torch.bool)
        if gaps is not None:
            near = gaps <= self._tolerance.near_tie
        # Not `>`, which is false of a NaN.
        differing = ~(differences <= self._tolerance.difference) & ~near
        part = Part(
            name=name,
            kind=kind,
            difference=differences.max().item(),
            end_to_end=end_to_end,
            differing=int(differing.sum()),
            near_ties=int(near.sum()),
            positions=near.numel(),
        )
        if part.differing and not any(earlier.differing for earlier in self._parts):
            self._suspects = tuple(name for name in tensors if self._is_other(self._tensors[name]))
        self._parts.append(part)
        if self._on_part is not None:
            self._on_part(part)

    def _is_other(self, info: TensorInfo) -> bool:
        """Whether our side's tensor has other values; only pieces of it are read at a time."""
        if self._source is None:
            return False
        pieces: Iterable[tuple[int | slice, ...]] = [()]
        if len(info.shape) == 3:
            pieces = ((expert,) for expert in range(info.shape[0]))
        elif info.shape[0] == self._config.vocab_size:
            pieces = ((rows,) for rows in vocabulary_blocks(self._config.vocab_size))
        return not all(
            torch.equal(
                self._source.get(info.name, *piece).float(),
                self._folder.get(info.name, *piece).float(),
            )
            for piece in pieces
        )
