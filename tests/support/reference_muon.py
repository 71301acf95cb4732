"""An independent Muon: what Megatron-Core's must make of each published matrix.

Written from the papers: Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), Polar
Express (Amsel et al., arXiv 2505.16932, algorithm 1 with its safety factor 1.01), and the scale
0.2 * sqrt(max(rows, columns)) of Liu et al., arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X, step by step, with four decimals as
# Emerging-Optimizers has them.
POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
)


def orthogonal(matrix: Tensor, coefficients: Iterable[tuple[float, float, float]]) -> Tensor:
    """About U V^T of a matrix U S V^T, in fp64; [rows, columns] or a batch of them."""
    x = matrix.double()
    x = x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for a, b, c in coefficients:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def is_muons(name: str, tensor: Tensor) -> bool:
    """Whether a published tensor is Muon's: what has rows and columns, but for the vocabulary."""
    return tensor.dim() > 1 and not name.endswith(
        ("embed_tokens.weight", "lm_head.weight", "shared_head.output.weight")
    )


class Muon(torch.optim.Optimizer):
    """Nesterov momentum as an average, Polar Express in six steps, decoupled weight decay.

    A parameter of three dimensions is a batch of matrices, as the published experts are.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta = group["momentum"]
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.mul_(beta).add_(parameter.grad, alpha=1 - beta)
                ahead = (1 - beta) * parameter.grad + beta * average
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * update(ahead).to(parameter.dtype))


def update(direction: Tensor) -> Tensor:
    """What a learning rate of one subtracts, [..., rows, columns] in fp64."""
    return 0.2 * max(direction.shape[-2:]) ** 0.5 * orthogonal(direction, POLAR_EXPRESS)
