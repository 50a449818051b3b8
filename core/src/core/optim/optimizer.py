"""Adam and AdamW over named weights: state keyed by the name of the weight, decay only where it belongs."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import inf
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from core.config.configurable import Configurable
from core.config.errors import UserError, at_most, did_you_mean


class Optimizer(Configurable):
    """Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101) on PyTorch's functional kernels.

    The learning rate is an argument of every step, because the schedule is a pure function of the step; so the state
    is the two moments and the count of updates of each weight, and nothing else.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        name: Literal["AdamW", "Adam"] = "AdamW"
        """AdamW shrinks weights directly; Adam adds the decay to the gradient."""
        lr: float = 8e-4
        """Peak learning rate; the schedule multiplies it."""
        beta1: float = 0.9
        """Decay of the mean of gradients."""
        beta2: float = 0.95
        """Decay of the mean of squared gradients."""
        eps: float = 1e-8
        """Added to the root of the mean square."""
        weight_decay: float = 0.1
        """Shrinkage per step, times the learning rate."""
        no_decay: list[str] = field(default_factory=lambda: ["*norm.weight", "*.bias", "*.sinks"])
        """Names of weights (globs) that are not shrunk. Of the default some fit no weight of some models."""
        implementation: Literal["fused", "foreach", "for-loop"] = "fused"
        """Which of PyTorch's kernels does the update."""

        def problems(self) -> Iterator[tuple[str, str]]:
            for name in ("lr", "weight_decay"):
                if not 0 <= getattr(self, name) < inf:
                    yield name, f"{name} {getattr(self, name)} must be a finite number, not negative"
            if not 0 < self.eps < inf:
                yield "eps", f"eps {self.eps} must be above 0: a weight without a gradient would divide 0 by 0"
            for name in ("beta1", "beta2"):
                if not 0 <= getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be in [0, 1)"

    def __init__(self, config: Config, *, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.config = config
        self.weights = {name: weight for name, weight in weights if weight.requires_grad}
        self.state: dict[str, dict[str, Tensor]] = {}
        exempt = {name for name in self.weights if any(fnmatchcase(name, glob) for glob in config.no_decay)}
        self.groups = [
            (config.weight_decay, [name for name in self.weights if name not in exempt]),
            (0.0, [name for name in self.weights if name in exempt]),
        ]

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradients of all weights that have one, in the order of their names' registration."""
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    def full_state(self) -> dict[str, dict[str, Tensor]]:
        """The moments and the count of updates of every weight by its name; those that were never updated get zeros."""
        return {name: self._state(name) for name in self.weights}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every weight that has a gradient, with learning rate `lr`."""
        c = self.config
        for weight_decay, names in self.groups:
            live = {name: grad for name in names if (grad := self.weights[name].grad) is not None}
            if not live:
                continue
            states = [self._state(name) for name in live]
            adam(
                [local_tensor(self.weights[name]) for name in live],
                [local_tensor(grad) for grad in live.values()],
                [local_tensor(state["exp_avg"]) for state in states],
                [local_tensor(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=c.implementation == "fused",
                foreach=c.implementation == "foreach",
                decoupled_weight_decay=c.name == "AdamW",
                amsgrad=False,
                maximize=False,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                lr=lr,
                weight_decay=weight_decay,
            )

    def _state(self, name: str) -> dict[str, Tensor]:
        if name not in self.state:
            weight = self.weights[name]
            self.state[name] = {
                "step": torch.zeros((), device=weight.device if self.config.implementation == "fused" else "cpu"),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        return self.state[name]


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that is spread over ranks; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_no_decay(config: Optimizer.Config, names: Iterable[str]) -> None:
    """Raise `UserError` for globs that fit none of these names of weights, unless they are the default."""
    if config.no_decay == Optimizer.Config().no_decay:
        return
    names = list(names)
    lost = [glob for glob in config.no_decay if not any(fnmatchcase(name, glob) for name in names)]
    if lost:
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        near = did_you_mean(lost[0], kinds, n=3, cutoff=0.4) or f"there are {', '.join(at_most(3, kinds))}"
        raise UserError(f"optimizer.no_decay: no weight is called {', '.join(lost)}; {near}")
