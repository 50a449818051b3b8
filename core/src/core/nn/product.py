"""How a layer multiplies its input with its weight, where that is not the plain product."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from core.nn.grouped import GroupedLinear
from core.nn.layers import Linear


def of_one_rank(numbers: Tensor) -> Tensor:
    """The numbers themselves, of any shape."""
    return numbers


class Product(ABC):
    """Takes the place of the product in a `Linear` or a `GroupedLinear`, whose weight, names and axes stay.

    A converter puts it there (`core.quantization.converter`). Letters: I input width, O output width, R rows sorted by
    group, G groups.
    """

    multiple: int = 1
    """The sizes of a weight, on each rank, must be multiples of this."""
    maximum: Callable[[Tensor], Tensor] = staticmethod(of_one_rank)
    """Maxima over what this rank computes with, made those over all ranks of a layer: `core.parallel` replaces it."""

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y (..., O) of x (..., I) and weight (O, I)."""

    @abstractmethod
    def grouped(self, x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
        """y (R, O): each row times the matrix of its group, which has `counts_G` rows."""

    def numbers(self, weight: Tensor) -> Tensor:
        """What a weight is, of any shape, in whatever form it is kept."""
        return weight

    def device_problem(self, device: torch.device) -> str:
        """Why it cannot be computed on `device`; empty where it can."""
        del device
        return ""


class PackedProduct(Product):
    """A product whose weight may travel between ranks as bytes."""

    packs: bool = False
    """Whether it does, where ranks gather weights for each use."""
    weight_amax: Tensor | None = None
    """The largest absolute number of the whole weight, where the ranks have found it before the step."""

    @abstractmethod
    def packed(self, weight: Tensor) -> Tensor:
        """A weight, of any shape, or a part of it, as bytes of the same shape."""

    @abstractmethod
    def unpacked(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight again, of any shape: with the numbers that the product would make of it."""


class ByProduct:
    """What a layer's class gains when its product is computed otherwise."""

    product: Product

    def forward(self: Any, x: Tensor, *counts: Tensor) -> Tensor:
        """As of the plain layer: y (..., O) of x (..., I), or of rows (R, I) with the counts of groups."""
        if not counts:
            y = self.product(x, self.weight)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return self._with_bias(self.product.grouped(x, self.weight, *counts), *counts)


@cache
def by_product(cls: type[nn.Module]) -> Any:
    """The class of layers of a class whose product is one's own; it goes by the same name."""
    return type(cls.__name__, (ByProduct, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def put_product(layer: Linear | GroupedLinear, product: Product) -> None:
    """Have a layer compute by `product`, in place: weights, axes, start and hooks stay, as by
    `torch.nn.utils.parametrize`."""
    layer.__class__ = by_product(type(layer))
    vars(layer)["product"] = product


def layer_products(model: nn.Module) -> Iterator[tuple[nn.Module, Product]]:
    """Every layer that has a product of its own, with it."""
    for module in model.modules():
        if isinstance(module, ByProduct):
            yield module, module.product
