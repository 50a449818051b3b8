"""A converter as somebody writes it outside of core; docs/add-a-converter.md shows it."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core.nn.grouped import grouped_mm
from core.nn.product import Product, put_product
from core.quantization.converter import Converter, Layer


@dataclass(eq=False)
class Stepped(Product):
    """The plain product with a weight whose numbers are rounded to even steps; the gradient passes the rounding by."""

    n_steps: int

    def rounded(self, weight: Tensor) -> Tensor:
        step = self.maximum(weight.detach().abs().amax()) / self.n_steps
        return weight + ((weight / step).round() * step - weight).detach()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, self.rounded(weight))

    def grouped(self, x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
        return grouped_mm(x_RI, self.rounded(weight_GOI), counts_G)


class SteppedConverter(Converter):
    """Trains weights that will be stored as whole numbers."""

    label = "stepped weights"

    @dataclass(kw_only=True, slots=True)
    class Config(Converter.Config):
        n_steps: int = 7
        """Steps on each side of zero."""

    def convert(self, layer: Layer) -> str:
        put_product(layer.module, Stepped(self.config.n_steps))
        return ""
