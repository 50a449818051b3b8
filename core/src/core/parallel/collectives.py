"""Two of PyTorch's functional collectives, which have other names before torch 2.13."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed import _functional_collectives as functional


def _named(new: str, old: str) -> Callable[..., Any]:
    """The function `new` where this torch has it, or else `old`, which later releases warn of."""
    return getattr(functional, new, None) or getattr(functional, old)


_gather = _named("all_gather_single", "all_gather_tensor")
_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")


def all_gather(x: Tensor, dim: int, ranks: Any) -> Tensor:
    """The tensors of all n ranks, (..., n L, ...) of (..., L, ...) along `dim`; `x` is contiguous."""
    return functional.wait_tensor(_gather(x, dim, ranks))


def reduce_scatter(x: Tensor, dim: int, ranks: Any) -> Tensor:
    """This rank's part, (..., L, ...) of (..., n L, ...) along `dim`, summed over the n ranks; `x` is contiguous."""
    return functional.wait_tensor(_scatter(x, "sum", dim, ranks))
