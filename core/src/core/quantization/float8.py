"""float8: the products of linear layers, those of experts too, of numbers of 8 bits (arXiv:2209.05433)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from core.nn.product import put_product
from core.quantization.converter import Converter, Layer
from core.quantization.kernels import MULTIPLE, device_problem
from core.quantization.product import Forms, Pair, QuantisedProduct

E4M3, E5M2, ROW = "e4m3_tensorwise", "e5m2_tensorwise", "e4m3_rowwise"
RECIPES = {
    "tensorwise": Forms(output=Pair(E4M3, E4M3), grad_input=Pair(E5M2, E4M3), grad_weight=Pair(E5M2, E4M3)),
    "rowwise": Forms(output=Pair(ROW, ROW), grad_input=Pair(ROW, ROW), grad_weight=Pair(ROW, ROW)),
    "rowwise_with_gw_hp": Forms(output=Pair(ROW, ROW), grad_input=Pair(ROW, E4M3), grad_weight=Pair()),
}


class Float8LinearConverter(Converter):
    """Products of 8 bits, whose scales are found anew for each product.

    Tensor-wise, all ranks that compute with a tensor use one scale, that of the whole tensor, and the weights of
    all experts of a layer are one tensor: so a layout changes no scale.
    """

    label, multiple = "float8", MULTIPLE

    @dataclass(kw_only=True, slots=True)
    class Config(Converter.Config):
        recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
        """One scale for a tensor, gradients as e5m2; or for each row a power of two, all as e4m3; or so with the
        gradients of weights in full precision."""
        enable_fsdp_float8_all_gather: bool = False
        """tensorwise: ranks gather weights as bytes, with scales that are found once per step, for all weights."""
        emulate: bool = False
        """Compute the same by plain arithmetic, on any device and slowly, instead of by a GPU's kernels."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.enable_fsdp_float8_all_gather and self.recipe_name != "tensorwise":
                yield (
                    "enable_fsdp_float8_all_gather",
                    f"enable_fsdp_float8_all_gather needs one scale for a weight, and recipe_name {self.recipe_name} "
                    "has one for each row: use tensorwise, or leave it off",
                )

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    def convert(self, layer: Layer) -> str:
        config = self.config
        product = QuantisedProduct(
            RECIPES[config.recipe_name],
            emulate=config.emulate,
            multiple=MULTIPLE,
            packs=config.enable_fsdp_float8_all_gather,
        )
        put_product(layer.module, product)
        return ""

    def device_problem(self, device: torch.device) -> str:
        return "" if self.config.emulate else device_problem(device, "float8")
