"""Low-rank adapters beside the weight of a linear layer, which stays as it is (LoRA, arXiv:2106.09685).

    y = x W^T + scale (x A^T) B^T          A (r, I) drawn, B (O, r) zero at the start

With a magnitude (DoRA, arXiv:2402.09353) each row of V = W + scale B A gets a length of its own, relative to that of
the row of W, and 1 at the start: y = magnitude |W| / |V| (x V^T), |V| taken for a constant by backward.

Of a stack of matrices each has an adapter, and a magnitude, of its own.

Letters: I input width, O output width, r rank, R rows sorted by group, G groups.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.activation_checkpoint.region import recomputed
from core.nn.grouped import GroupedLinear, grouped_mm
from core.nn.layers import Linear
from core.nn.module import Flops
from core.nn.product import ByProduct, of_one_rank
from core.nn.start import Constant, Normal

ADAPTER_WEIGHTS = ("lora_a", "lora_b", "magnitude")
"""The names of the weights of an adapter, beside `weight`."""


class Adapted:
    """What a layer's class gains with an adapter."""

    lora_scale: float
    n_numbers: int
    """Of the weight, in whatever form it is kept, and of the matrices beside it."""
    magnitude: nn.Parameter | None
    sum_columns: Callable[[Tensor], Tensor] = staticmethod(of_one_rank)
    """Sums over the inputs that this rank has, made those over all inputs: `core.parallel` replaces it."""

    @staticmethod
    def beside(axes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The axes of the adapter's weights, beside a weight of these axes."""
        *stack, n_out, n_in = axes
        return {"lora_a": (*stack, "lora", n_in), "lora_b": (*stack, n_out, "lora"), "magnitude": (*stack, n_out)}

    def forward(self: Any, x: Tensor, *counts: Tensor) -> Tensor:
        """As of the layer: y (..., O) of x (..., I), or of rows (R, I) with the counts of groups."""
        y = super().forward(x, *counts)  # pyrefly: ignore[missing-attribute] - the layer's
        with recomputed():  # small products: neither worth keeping, nor counted among the others
            multiply: Callable[..., Tensor] = grouped_mm if counts else F.linear
            more = self.lora_scale * multiply(multiply(x, self.lora_a, *counts), self.lora_b, *counts)
            if self.magnitude is None:
                return y + more
            bias = 0.0 if self.bias is None else of_rows(self.bias, y, *counts)
            factor = of_rows(self.magnitude, y, *counts) * of_rows(self.lengthened(), y, *counts)
            return factor * (y - bias + more) + bias

    @torch.no_grad()
    def lengthened(self: Any) -> Tensor:
        """|W| / |V| of each row, (O,) or (G, O)."""
        weight = numbers_of(self).float()
        adapted = weight + self.lora_scale * (self.lora_b.float() @ self.lora_a.float())
        own, other = self.sum_columns(torch.stack((weight.square().sum(-1), adapted.square().sum(-1)))).sqrt()
        return own / other

    def flops_per_token(self: Any, seq_len: int) -> Flops:
        """Those of the layer, and of the two small products; those of experts are counted by their mixture."""
        del seq_len
        return Flops() if isinstance(self, GroupedLinear) else Flops(matmul=2 * self.n_numbers)


def of_rows(values: Tensor, y: Tensor, counts_G: Tensor | None = None) -> Tensor:
    """Values of outputs (O,), or of those of each group (G, O), for the rows of y (..., O); in its dtype."""
    if counts_G is None:
        return values.to(y.dtype)
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # backward adds up rows of a group in it
    return values.repeat_interleave(counts_G, dim=0, output_size=y.shape[0]).to(y.dtype)


def numbers_of(layer: Linear | GroupedLinear) -> Tensor:
    """The numbers of a layer's weight, (O, I) or (G, O, I), in whatever form it is kept."""
    return layer.product.numbers(layer.weight) if isinstance(layer, ByProduct) else layer.weight


@cache
def with_adapter(cls: type[nn.Module]) -> Any:
    """The class of layers of a class with an adapter; it goes by the same name."""
    return type(cls.__name__, (Adapted, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def add_adapter(layer: Linear | GroupedLinear, rank: int, scale: float, *, magnitude: bool) -> None:
    """Give a layer, which has no memory yet, an adapter, in place; what it has stays."""
    *stack, n_out, n_in = layer.weight.shape
    layer.__class__ = with_adapter(type(layer))
    made: Any = layer
    made.lora_scale = scale
    made.lora_a = nn.Parameter(layer.weight.new_empty(*stack, rank, n_in))
    made.lora_b = nn.Parameter(layer.weight.new_empty(*stack, n_out, rank))
    made.magnitude = nn.Parameter(layer.weight.new_empty(*stack, n_out)) if magnitude else None
    layer.start |= {"lora_a": Normal((3 * n_in) ** -0.5), "lora_b": Constant(0.0), "magnitude": Constant(1.0)}
    made.n_numbers = layer.weight.numel() + made.lora_a.numel() + made.lora_b.numel()
