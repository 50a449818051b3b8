"""The gated feed-forward network.

Letters: B rows, L length, D width, F hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core.config.configurable import Configurable
from core.nn.layers import Linear
from core.nn.module import Module, cpu_forms, size_problems
from core.nn.start import Scale


class FeedForward(Module, Configurable):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    AXES = {"w1": ("ffn", "embed"), "w3": ("ffn", "embed"), "w2": ("embed", "ffn")}
    SIZED_BY = {"ffn": ("hidden_dim",)}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        hidden_dim: int
        """Width between the two matrix products."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from size_problems(self, "hidden_dim")

    def __init__(self, config: Config, *, dim: int, scale: Scale) -> None:
        super().__init__()
        self.w1 = Linear(dim, config.hidden_dim, std=scale.std)
        self.w3 = Linear(dim, config.hidden_dim, std=scale.std)
        self.w2 = Linear(config.hidden_dim, dim, std=scale.residual)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x_BLD), self.w3(x_BLD)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any shape."""
    forms = cpu_forms(gate)
    return F.silu(gate) * up if forms is None else forms.swiglu(gate, up)
