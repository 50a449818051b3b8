"""Adam and AdamW, on PyTorch's functional kernels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from core.optim.optimizer import Optimizer
from core.optim.weight import LocalWeight, NamedWeight


class TwoMoments(Optimizer, ABC):
    """The mean of gradients over the root of the mean of their squares, both corrected for their start at zero."""

    @dataclass(kw_only=True, slots=True)
    class Config(Optimizer.Config):
        beta1: float = 0.9
        """Decay of the mean of gradients."""
        beta2: float = 0.95
        """Decay of the mean of squared gradients."""
        eps: float = 1e-8
        """Added to the root of the mean square."""
        implementation: Literal["fused", "foreach", "for-loop"] = "fused"
        """Which of PyTorch's kernels does the update."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if not 0 < self.eps < inf:
                yield "eps", f"eps {self.eps} must be above 0: a weight without a gradient would divide 0 by 0"
            for name in ("beta1", "beta2"):
                if not 0 <= getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be in [0, 1)"

        def has_betas(self, weight: NamedWeight) -> bool:
            return True

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Optimizer

    never_negative = ("exp_avg_sq",)

    @property
    @abstractmethod
    def decouples_decay(self) -> bool:
        """Whether weights are shrunk directly, or the decay is added to the gradient."""

    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        """The two moments, and the count of updates."""
        on = weight.value.device if self.config.implementation == "fused" else "cpu"
        return {"step": torch.zeros((), device=on), "exp_avg": weight.zeros(), "exp_avg_sq": weight.zeros()}

    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        c = self.config
        alike: dict[tuple[float, tuple[float, float]], list[LocalWeight]] = {}
        for weight in weights:
            alike.setdefault((self.weight_decay(weight), weight.group.betas or (c.beta1, c.beta2)), []).append(weight)
        for (weight_decay, (beta1, beta2)), group in alike.items():
            adam(
                [weight.value for weight in group],
                [weight.grad for weight in group],
                [weight.state["exp_avg"] for weight in group],
                [weight.state["exp_avg_sq"] for weight in group],
                [],
                [weight.state["step"] for weight in group],
                fused=c.implementation == "fused",
                foreach=c.implementation == "foreach",
                decoupled_weight_decay=self.decouples_decay,
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                eps=c.eps,
                lr=c.lr * lr_factor,
                weight_decay=weight_decay,
            )


class Adam(TwoMoments):
    """Adam (arXiv:1412.6980): the decay is added to the gradient."""

    decouples_decay = False


class AdamW(TwoMoments):
    """AdamW (arXiv:1711.05101): weights are shrunk directly."""

    decouples_decay = True
