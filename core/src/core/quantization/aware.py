"""Quantisation-aware training: weights that will be published in few bits are trained as the numbers they will be."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from core.nn.grouped import grouped_mm, to_autocast
from core.nn.product import Product, put_product
from core.quantization.converter import Converter, Layer
from core.quantization.forms import FORMS


class RoundedWeight(Product):
    """The plain product with a weight in few bits; its gradient goes to the weight itself (arXiv:1308.3432)."""

    def __init__(self, form: str) -> None:
        self.form, self.multiple = form, FORMS[form].block

    def __repr__(self) -> str:
        return f"RoundedWeight({self.form})"

    def rounded(self, weight: Tensor) -> Tensor:
        """The numbers that those of a weight (..., O, I) become, with the gradient of the weight."""
        form, own = FORMS[self.form], weight.detach()
        amax = self.maximum(own.abs().amax()) if form.whole else None
        numbers = form.quantised(own.float() if own.element_size() < 4 else own, amax).to(weight.dtype)
        return weight + (numbers - own)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(to_autocast(x), to_autocast(self.rounded(weight)))

    def grouped(self, x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
        return grouped_mm(x_RI, self.rounded(weight_GOI), counts_G)


class QATConverter(Converter):
    """Layers whose weights are rounded to few bits for each use, and whose other numbers stay as they are."""

    label, multiple, trains_weights = "quantisation-aware", 32, True

    @dataclass(kw_only=True, slots=True)
    class Config(Converter.Config):
        weight_dtype: Literal["mxfp4", "nvfp4", "mxfp8"] = "mxfp4"
        """What weights will be: mxfp4 is how the experts of GPT-OSS are published."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    def convert(self, layer: Layer) -> str:
        put_product(layer.module, RoundedWeight(self.config.weight_dtype))
        return ""
