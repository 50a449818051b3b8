"""Lion: the sign of a mean of gradients, so that one number is kept of each weight's."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from core.optim.optimizer import Optimizer
from core.optim.weight import LocalWeight, NamedWeight


class Lion(Optimizer):
    """Lion (arXiv:2302.06675): every number moves by the learning rate, in the direction of a mean of gradients."""

    @dataclass(kw_only=True, slots=True)
    class Config(Optimizer.Config):
        lr: float = 2e-4
        """Peak learning rate, a third to a tenth of AdamW's; the schedule multiplies it."""
        weight_decay: float = 0.3
        """Shrinkage per step, times the learning rate; three to ten times AdamW's."""
        beta1: float = 0.9
        """Share of the mean in the direction; the rest is the gradient's."""
        beta2: float = 0.99
        """Decay of the mean of gradients."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            for name in ("beta1", "beta2"):
                if not 0 <= getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be in [0, 1)"

        def has_betas(self, weight: NamedWeight) -> bool:
            return True

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Optimizer

    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        return {"exp_avg": weight.zeros()}

    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        lr = self.config.lr * lr_factor
        for weight in weights:
            beta1, beta2 = weight.group.betas or (self.config.beta1, self.config.beta2)
            mean = weight.state["exp_avg"]
            weight.value.mul_(1 - lr * self.weight_decay(weight))
            weight.value.sub_(mean.lerp(weight.grad, 1 - beta1).sign_(), alpha=lr)
            mean.lerp_(weight.grad, 1 - beta2)
