"""Stochastic gradient descent with momentum."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from core.optim.optimizer import Optimizer
from core.optim.weight import LocalWeight


class SGD(Optimizer):
    """SGD with momentum, a decaying sum of gradients; weights are shrunk directly, as by AdamW (arXiv:1711.05101)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Optimizer.Config):
        lr: float = 0.1
        """Peak learning rate; the schedule multiplies it."""
        momentum: float = 0.9
        """Decay of the sum of gradients; 0 keeps none, and no state."""
        nesterov: bool = False
        """Follow the sum as it will be after another such gradient."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if not 0 <= self.momentum < 1:
                yield "momentum", f"momentum {self.momentum} must be in [0, 1)"
            if self.nesterov and self.momentum == 0:
                yield "nesterov", "nesterov with momentum 0 changes nothing: raise the momentum, or unset it"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Optimizer

    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        return {"momentum": weight.zeros()} if self.config.momentum else {}

    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        c, lr = self.config, self.config.lr * lr_factor
        for weight in weights:
            direction = weight.grad
            if c.momentum:
                total = weight.state["momentum"].mul_(c.momentum).add_(weight.grad)
                direction = weight.grad.add(total, alpha=c.momentum) if c.nesterov else total
            weight.value.mul_(1 - lr * self.weight_decay(weight)).sub_(direction, alpha=lr)
