"""A comparison's parts, a source of weights for it, and what changes one of them."""

import torch

from support.figures import record
from support.reference import WINDOW

LENGTH = 3 * WINDOW
HEADS = [
    "lm_head.weight",
    "model.layers.6.transformer.shared_head.output.weight",
    "model.layers.7.transformer.shared_head.output.weight",
]
PARTS = [
    "embedding",
    *(f"layer {index}" for index in range(6)),
    HEADS[0],
    *("layer 6", HEADS[1], "layer 7", HEADS[2]),
]


class Source:
    """A dictionary of published tensors as `compare` takes them."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    def get(self, name, *index):
        return self.weights[name][index].clone()


def differing(report) -> list[str]:
    return [part.name for part in report.parts if part.differing]


def assert_agrees(report):
    assert report.agrees and report.first_difference is None and not differing(report)
    assert record("parts", max(part.difference for part in report.parts)) < 1e-5
    assert max(part.end_to_end for part in report.parts) < 1e-5
    for logits in report.logits:
        assert 1 - 1e-9 < logits.cosine_min <= logits.cosine_mean < 1 + 1e-9
        assert logits.top1 == 1
        assert logits.largest > 0 and 0 < logits.relative < 1e-5


def change(tensor):
    return tensor + 0.3 * tensor.flip(0)


def change_one_expert(tensor):
    changed = tensor.clone()
    changed[1] = change(changed[1])
    return changed
