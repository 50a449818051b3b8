"""Optimizers as somebody writes them outside of core: no word about ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from core.optim.optimizer import Optimizer
from core.optim.weight import LocalWeight


class Signum(Optimizer):
    """The sign of a mean of gradients as the update (arXiv:1802.04434)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Optimizer.Config):
        lr: float = 2e-4
        """Peak learning rate; a third to a tenth of Adam's."""
        beta: float = 0.9
        """Decay of the mean of gradients."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if not 0 <= self.beta < 1:
                yield "beta", f"beta {self.beta} must be in [0, 1)"

    config: Config

    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        return {"mean": weight.zeros()}

    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        c, lr = self.config, self.config.lr * lr_factor
        for weight in weights:
            mean = weight.state["mean"].lerp_(weight.grad, 1 - c.beta)
            weight.value.mul_(1 - lr * self.weight_decay(weight)).sub_(mean.sign(), alpha=lr)


class Orthogonal(Optimizer):
    """Momentum that is made orthogonal for matrices (after arXiv:2502.16982); all else moves by its sign."""

    @dataclass(kw_only=True, slots=True)
    class Config(Optimizer.Config):
        sign_lr: float = 2e-3
        """Peak learning rate of what is no matrix of a block."""
        momentum: float = 0.9
        """Decay of the sum of gradients."""

    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        return {"momentum": weight.zeros()}

    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        c = self.config
        for weight in weights:
            weight.state["momentum"].mul_(c.momentum).add_(weight.grad)
        matrices = [weight for weight in weights if weight.is_matrix and "vocab" not in weight.axes]
        made = self.map_matrices(orthogonal, matrices, [weight.state["momentum"] for weight in matrices])
        moves = [(c.lr, *pair) for pair in zip(matrices, made, strict=True)]
        moves += [(c.sign_lr, weight, weight.state["momentum"].sign()) for weight in weights if weight not in matrices]
        for lr, weight, direction in moves:
            weight.value.mul_(1 - lr * lr_factor * self.weight_decay(weight)).sub_(direction, alpha=lr * lr_factor)


def orthogonal(x_NRC: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T, by five steps of a polynomial that draws all of S to 1."""
    x_NRC = x_NRC / (x_NRC.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        square_NRR = x_NRC @ x_NRC.mT
        x_NRC = 3.4445 * x_NRC + (-4.775 * square_NRR + 2.0315 * square_NRR @ square_NRR) @ x_NRC
    return x_NRC
