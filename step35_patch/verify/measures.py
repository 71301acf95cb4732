"""The numbers by which two sides are compared, position by position.

Shapes: b sequences, s tokens, h hidden size, n features of any part's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step35_patch.verify.report import LogitsAgreement


def relative(difference: Tensor, largest: Tensor) -> Tensor:
    """`difference / largest`, both of any one shape; 0 where both are 0."""
    return difference / largest.clamp(min=torch.finfo(largest.dtype).tiny)


def own_difference(given: Tensor, expected: Tensor, before: Tensor | None) -> Tensor:
    """Each position's `Part.difference`: [b, s, n] -> [b * s], float32.

    Args:
        given: our part's output for the reference's input.
        expected: the reference's output.
        before: that input, if the part adds to it.
    """
    off = (given.float() - expected.float()).abs()
    change = expected.float()
    if before is not None:
        # Two additions on each side. Single features of hidden states can be thousands of times as
        # large as what a layer adds to them.
        rounding = 2 * torch.finfo(expected.dtype).eps * expected.float().abs()
        off, change = (off - rounding).clamp(min=0), change - before.float()
    return relative(off.amax(-1), change.abs().amax(-1)).flatten()


def end_to_end_difference(own: Tensor, expected: Tensor) -> float:
    """`Part.end_to_end` of [b, s, h]."""
    off, largest = (own.float() - expected.float()).abs().max(), expected.float().abs().max()
    return relative(off, largest).item()


class LogitsMeasure:
    """What is measured of both sides' logits [positions, vocabulary], given by blocks of columns.

    Args:
        positions: how many.
    """

    def __init__(self, positions: int):
        # Of found and wanted, of found with itself and of wanted with itself.
        self._products = torch.zeros(3, positions, dtype=torch.float64)
        self._off, self._given_off, self._largest = torch.zeros(3, positions)
        self._tops = _Tops(), _Tops()

    def add(self, found: Tensor, given: Tensor, wanted: Tensor, start: int) -> None:
        """Add a block: [positions, columns] each, float32.

        Args:
            found: ours, each side having computed all by itself.
            given: ours, of the reference's normed states.
            wanted: the reference's.
            start: the token of the first column.
        """
        pairs = (found, wanted), (found, found), (wanted, wanted)
        for product, (a, b) in zip(self._products, pairs, strict=True):
            product += (a.double() * b.double()).sum(-1)
        self._off = torch.maximum(self._off, (found - wanted).abs().amax(-1))
        self._given_off = torch.maximum(self._given_off, (given - wanted).abs().amax(-1))
        self._largest = torch.maximum(self._largest, wanted.abs().amax(-1))
        for tops, block in zip(self._tops, (found, wanted), strict=True):
            tops.add(block, start)

    @property
    def own_difference(self) -> Tensor:
        """Each position's `Part.difference` of the output matrix: [positions]."""
        return relative(self._given_off, self._largest)

    def agreement(self, name: str) -> LogitsAgreement:
        """The result for the output matrix `name`, once all blocks have been added."""
        product, ours, theirs = self._products
        cosine = product / (ours * theirs).sqrt()
        tops, expected = (tops.tokens() for tops in self._tops)
        return LogitsAgreement(
            name=name,
            cosine_min=cosine.min().item(),
            cosine_mean=cosine.mean().item(),
            largest=self._off.max().item(),
            relative=relative(self._off.max(), self._largest.max()).item(),
            top1=(tops == expected).double().mean().item(),
        )


class _Tops:
    """The token of the largest logit at each position, over blocks of the vocabulary."""

    def __init__(self) -> None:
        self._of_blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, block: Tensor, start: int) -> None:
        """block: [positions, columns], whose first column is the token `start`."""
        values, columns = block.max(-1)
        self._of_blocks.append((values, columns + start))

    def tokens(self) -> Tensor:
        """[positions]; the first token of several that have the largest logit."""
        values, tokens = (torch.stack(each) for each in zip(*self._of_blocks, strict=True))
        return tokens.gather(0, values.argmax(0, keepdim=True))[0]
