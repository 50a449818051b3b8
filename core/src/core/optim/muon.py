"""Muon: momentum whose matrices are made orthogonal, with AdamW for all that is no matrix of a block.

The momentum U S V^T of a matrix becomes nearly U V^T: all its directions are followed equally far. Five steps of a
polynomial do that without a decomposition. Each multiplies small singular values by 3.4445, so that directions that
hardly occur are lifted by 485, and rounding errors with them, which matters where a gradient is of low rank, as that of
an expert that saw few tokens. Measured on 128 x 384 matrices of rank r that are multiplied by 1.001, as if sums over
ranks were rounded otherwise: by how much the update changes, and its share outside of the span of the gradient.

    r                      1        8        32       128 (full)
    bfloat16   change      1.2      0.41     0.25     0.026
               outside     0.85     0.38     0.25     0
    float32    change      5.0e-5   1.5e-5   8.7e-6   1.6e-6
               outside     9.4e-5   2.0e-5   1.4e-5   0

In bfloat16 the update of a matrix of rank 1 is mostly noise, and another one in every layout: float32 is the default,
on every device. Experts without a token have a momentum that only decays, and the update that follows from it.

Letters: N matrices of a stack (1 where there is none), R rows, C columns.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from core.optim.adam import AdamW
from core.optim.optimizer import Optimizer
from core.optim.patterns import pattern_problems
from core.optim.weight import LocalWeight, NamedAxes, NamedWeight, WeightLayout, names_matrix

NOT_MATRICES = {"vocab", "choices"}
"""Axes of matrices whose rows are a thing each, looked up or compared: embedding, head, and the gates of routers."""


class Muon(Optimizer):
    """Muon (arXiv:2502.16982) for the matrices of blocks, experts one by one; its companion AdamW for all else.

    Each matrix is orthogonalised whole and once, on one of the ranks that share it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Optimizer.Config):
        momentum: float = 0.95
        """Decay of the mean of gradients."""
        nesterov: bool = True
        """Orthogonalise the mean as it will be after another such gradient."""
        ns_steps: int = 5
        """Newton-Schulz steps."""
        ns_dtype: Literal["float32", "bfloat16"] = "float32"
        """What these compute in; bfloat16 is faster on an accelerator, and turns matrices of low rank into noise."""
        scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
        """Factor on the learning rate of a matrix of R rows and C columns: 0.2 sqrt(max(R, C)), by which AdamW's rates
        fit, or sqrt(max(1, R / C))."""
        companion: AdamW.Config = field(default_factory=AdamW.Config)
        """The AdamW for embedding, head, gates, vectors and `companion_weights`, with a learning rate of its own."""
        companion_weights: list[str] = field(default_factory=list)
        """Names of matrices (globs) that the companion updates as well."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if not 0 <= self.momentum < 1:
                yield "momentum", f"momentum {self.momentum} must be in [0, 1)"
            if not 1 <= self.ns_steps <= 20:
                yield "ns_steps", f"ns_steps {self.ns_steps} must be from 1 to 20"
            for name in ("groups", "state_dtype", "ema_decay", "in_backward"):
                if getattr(self.companion, name) != getattr(AdamW.Config(), name):
                    yield f"companion.{name}", f"the companion follows optimizer.{name}: state it there"

        def orthogonalises(self, weight: NamedAxes) -> bool:
            """Whether a weight is not the companion's."""
            named = any(fnmatchcase(weight.name, glob) for glob in self.companion_weights)
            return names_matrix(weight.axes) and NOT_MATRICES.isdisjoint(weight.axes) and not named

        def further_lrs(self) -> dict[str, float]:
            return {"lr_companion": self.companion.lr}

        def deals_matrices(self) -> bool:
            return True

        def has_betas(self, weight: NamedWeight) -> bool:
            return not self.orthogonalises(weight)

        def weight_problems(self, weights: Sequence[NamedWeight]) -> Iterator[tuple[str, str]]:
            yield from super().weight_problems(weights)
            yield from pattern_problems("companion_weights", self.companion_weights, [each.name for each in weights])
            for name, message in self.companion.weight_problems(weights):
                yield f"companion.{name}", message

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Optimizer

    def __init__(self, config: Config, *, weights: Iterable[NamedWeight], layout: WeightLayout) -> None:
        self.companion: AdamW = config.companion.build(weights=[], layout=layout)
        super().__init__(config, weights=weights, layout=layout)

    never_negative = AdamW.never_negative

    def new_state(self, weight: LocalWeight) -> dict[str, Tensor]:
        own = self.config.orthogonalises(weight)
        return {"momentum": weight.zeros()} if own else self.companion.new_state(weight)

    def update(self, weights: list[LocalWeight], lr_factor: float) -> None:
        c = self.config
        matrices = [weight for weight in weights if "momentum" in weight.state]
        self.companion.update([weight for weight in weights if "momentum" not in weight.state], lr_factor)
        moments = []
        for weight in matrices:
            moment = weight.state["momentum"].lerp_(weight.grad, 1 - c.momentum)
            moments.append(weight.grad.lerp_(moment, c.momentum) if c.nesterov else moment)
        function = partial(orthogonal, steps=c.ns_steps, dtype=getattr(torch, c.ns_dtype))
        for weight, direction in zip(matrices, self.map_matrices(function, matrices, moments), strict=True):
            lr, (rows, columns) = c.lr * lr_factor, weight.shape[-2:]
            weight.value.mul_(1 - lr * self.weight_decay(weight))
            weight.value.sub_(direction, alpha=lr * scale(rows, columns, c.scale))


def scale(rows: int, columns: int, rule: Literal["match_rms_adamw", "original"]) -> float:
    """The factor on the learning rate of a matrix."""
    if rule == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonal(x_NRC: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices with the singular vectors of these and singular values near 1 (from 0.7 to 1.2), by Newton-Schulz steps
    of degree 5; zeros stay zeros."""
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    y_NRC = (x_NRC.mT if tall else x_NRC).to(dtype)
    y_NRC = y_NRC / torch.linalg.matrix_norm(y_NRC, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square_NRR = y_NRC @ y_NRC.mT
        factor_NRR = torch.baddbmm(square_NRR, square_NRR, square_NRR, beta=-4.775, alpha=2.0315)
        y_NRC = torch.baddbmm(y_NRC, factor_NRR, y_NRC, beta=3.4445)
    return (y_NRC.mT if tall else y_NRC).to(x_NRC.dtype)
