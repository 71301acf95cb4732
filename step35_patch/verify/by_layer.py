"""The comparison of `step35_patch.verify.api`: both sides (`compare_sides`) part by part.

Shapes: b sequences, s tokens, h hidden size. Hidden states are [b, s, h] here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.storage.hf_folder import HfFolder
from step35_patch.tensors.published import TensorInfo, layer_tensors, published_tensors
from step35_patch.verify.api import (
    LogitsAgreement,
    Part,
    Report,
    Weights,
    layer_kind,
)
from step35_patch.verify.reference import (
    EMBEDDING,
    NORM,
    OurSide,
    ReferenceSide,
    vocabulary_blocks,
)

HEAD = "lm_head.weight"

# dtype: own difference up to which a part agrees, gap between the scores of two experts up to which
# rounding may choose between them. Scores are sigmoids, computed in float32 from inputs that are
# rounded to the dtype.
_TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (5e-2, 2e-2)}


def compare_layers(
    hf_dir: str | os.PathLike,
    config: Step35Config,
    source: Weights | None,
    shape: tuple[int, int],
    seed: int,
    dtype: torch.dtype | None,
    mtp: bool,
    on_part: Callable[[Part], None],
) -> Report:
    """As `step35_patch.verify.api.compare`, with a checked config and shape (b, s) of the tokens."""
    dtype = dtype or torch.float32
    if dtype not in _TOLERANCES:
        raise ValueError(
            f"dtype: expected one of {', '.join(map(str, _TOLERANCES))}, found {dtype}"
        )
    folder = HfFolder(hf_dir, published_tensors(config))
    tokens = _random_tokens(config, shape, seed)
    with torch.no_grad(), _single_process():
        reference = ReferenceSide(config, folder, tokens, dtype)
        ours = OurSide(hf_dir, source or folder, tokens, dtype, mtp)
        comparison = _Comparison(config, folder, source, dtype, on_part)
        return comparison.run(reference, ours, tokens, mtp)


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
        store = torch.distributed.HashStore()
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


# --- The comparison -----------------------------------------------------------------------------


def _own_difference(given: Tensor, expected: Tensor, before: Tensor | None) -> Tensor:
    """Each position's `Part.difference`: [b, s, n] -> [b * s].

    Args:
        given: ours, with the reference's input.
        before: that input, if the part adds to it.
    """
    off = (given.float() - expected.float()).abs()
    change = expected.float()
    if before is not None:
        # Two additions on each side. Single features of hidden states can be thousands of times as
        # large as what a layer adds to them.
        rounding = 2 * torch.finfo(expected.dtype).eps * expected.float().abs()
        off, change = (off - rounding).clamp(min=0), change - before.float()
    return _over(off.amax(-1), change.abs().amax(-1)).flatten()


def _over(difference: Tensor, largest: Tensor) -> Tensor:
    return difference / largest.clamp(min=torch.finfo(largest.dtype).tiny)


class _Top:
    """The largest number and its place at each position, over blocks of the vocabulary."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, block: Tensor, start: int) -> None:
        """block: [positions, rows], whose first row is the vocabulary's `start`."""
        value, place = block.max(-1)
        place = place + start
        if self.value is not None:
            larger = value > self.value
            value = torch.where(larger, value, self.value)
            place = torch.where(larger, place, self.place)
        self.value, self.place = value, place


class _Comparison:
    """Collects a Report.

    Args:
        source: our side's weights if they are not those of `folder`.
    """

    def __init__(
        self,
        config: Step35Config,
        folder: HfFolder,
        source: Weights | None,
        dtype: torch.dtype,
        on_part: Callable[[Part], None],
    ):
        self._config, self._folder, self._source, self._dtype = config, folder, source, dtype
        self._on_part = on_part
        self._tolerance, self._near = _TOLERANCES[dtype]
        self._tensors = {info.name: info for info in published_tensors(config)}
        self._parts: list[Part] = []
        self._logits: list[LogitsAgreement] = []
        self._suspects: tuple[str, ...] = ()

    def run(self, reference: ReferenceSide, ours: OurSide, tokens: Tensor, mtp: bool) -> Report:
        """Compute both sides to the end."""
        expected, own = reference.embedding(tokens), ours.embedding(tokens)
        own_difference = _own_difference(own, expected, None)
        embedding = [self._tensors[EMBEDDING]]
        self._add("embedding", "", embedding, own_difference, _end_to_end(own, expected))
        first = self._config.num_hidden_layers
        for plan in self._config.layers[:first]:
            before = expected
            expected, gaps = reference.layer(plan.index, before)
            own, given = ours.layer(plan.index, own, before)
            self._add_layer(plan, own, given, expected, before, gaps)
        before, expected = expected, reference.norm(expected)
        own, given = ours.norm(own, before)
        self._add_logits(HEAD, [NORM], own, given, expected)
        for plan in self._config.layers[first:] if mtp else ():
            before, expected = expected, reference.mtp_layer(plan.index - first, expected)
            own, given = ours.mtp_layer(plan.index - first, own, before)
            self._add_layer(plan, own, given, expected, None, None)
            head = f"model.layers.{plan.index}.transformer.shared_head.output.weight"
            self._add_logits(head, [], own, expected, expected)
        return Report(tuple(self._parts), tuple(self._logits), self._tolerance, self._suspects)

    def _add_layer(
        self,
        plan: LayerPlan,
        own: Tensor,
        given: Tensor,
        expected: Tensor,
        before: Tensor | None,
        gaps: Tensor | None,
    ) -> None:
        own_difference = _own_difference(given, expected, before)
        tensors = [info for info in layer_tensors(self._config, plan) if not _is_head(info)]
        name, kind = f"layer {plan.index}", layer_kind(plan)
        self._add(name, kind, tensors, own_difference, _end_to_end(own, expected), gaps)

    def _add(
        self,
        name: str,
        kind: str,
        tensors: list[TensorInfo],
        own_difference: Tensor,
        end_to_end: float,
        gaps: Tensor | None = None,
    ) -> None:
        """Add a part.

        Args:
            tensors: what it is made of.
            own_difference: [b * s].
            gaps: [b * s], between the scores of experts; None without any.
        """
        near = torch.zeros_like(own_difference, dtype=torch.bool)
        if gaps is not None:
            near = gaps <= self._near
        # Not `>`, which is false of a NaN.
        differing = ~(own_difference <= self._tolerance) & ~near
        part = Part(
            name=name,
            kind=kind,
            difference=own_difference.max().item(),
            end_to_end=end_to_end,
            differing=int(differing.sum()),
            near_ties=int(near.sum()),
            positions=near.numel(),
        )
        if part.differing and not any(earlier.differing for earlier in self._parts):
            self._suspects = tuple(i.name for i in tensors if self._is_other(i))
        self._parts.append(part)
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

    def _add_logits(
        self,
        matrix: str,
        tensors: list[str],
        own: Tensor,
        given: Tensor,
        expected: Tensor,
    ) -> None:
        """Add an output matrix, and the logits that it makes of normed states [b, s, h].

        Args:
            tensors: what else the part is made of.
        """
        own, given, expected = (hidden.flatten(0, 1) for hidden in (own, given, expected))
        products = torch.zeros(3, len(own), dtype=torch.float64)
        given_off, own_off, largest = torch.zeros(3, len(own))
        own_top, expected_top = _Top(), _Top()
        for rows in vocabulary_blocks(self._config.vocab_size):
            theirs = self._folder.get(matrix, rows).to(self._dtype)
            weight = (self._source or self._folder).get(matrix, rows).to(self._dtype)
            wanted = F.linear(expected, theirs).float()
            found, found_given = (F.linear(x, weight).float() for x in (own, given))
            for product, (a, b) in zip(
                products, ((found, wanted), (found, found), (wanted, wanted))
            ):
                product += (a.double() * b.double()).sum(-1)
            given_off = torch.maximum(given_off, (found_given - wanted).abs().amax(-1))
            own_off = torch.maximum(own_off, (found - wanted).abs().amax(-1))
            largest = torch.maximum(largest, wanted.abs().amax(-1))
            own_top.add(found, rows.start)
            expected_top.add(wanted, rows.start)
        relative = _over(own_off.max(), largest.max()).item()
        kind = "" if not tensors else f"after {', '.join(tensors)}"
        infos = [self._tensors[name] for name in (*tensors, matrix)]
        self._add(matrix, kind, infos, _over(given_off, largest), relative)
        cosine = products[0] / (products[1] * products[2]).sqrt()
        self._logits.append(
            LogitsAgreement(
                name=matrix,
                cosine_min=cosine.min().item(),
                cosine_mean=cosine.mean().item(),
                largest=own_off.max().item(),
                relative=relative,
                top1=(own_top.place == expected_top.place).double().mean().item(),
            )
        )


def _end_to_end(own: Tensor, expected: Tensor) -> float:
    """`Part.end_to_end` of [b, s, h]."""
    off, largest = (own.float() - expected.float()).abs().max(), expected.float().abs().max()
    return _over(off, largest).item()


def _is_head(info: TensorInfo) -> bool:
    return info.name.endswith("shared_head.output.weight")
