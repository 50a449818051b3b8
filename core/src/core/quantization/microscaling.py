"""Products of numbers in blocks that share a scale: MXFP8 (arXiv:2506.08027), MXFP4 and NVFP4 (arXiv:2509.25149)."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from core.nn.product import put_product
from core.quantization.converter import Converter, Layer
from core.quantization.product import Forms, Pair, QuantisedProduct

MXFP8_FORMS = {"mxfp8_rceil": "mxfp8", "mxfp8_floor": "mxfp8_floor"}


class BlockConverter(Converter):
    """Products in forms with blocks, which are emulated on every device."""

    @dataclass(kw_only=True, slots=True)
    class Config(Converter.Config):
        emulate: bool = False
        """Compute by plain arithmetic, on any device and slowly. There is no other way here yet."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if not self.emulate:
                yield "emulate", "numbers in blocks are emulated alone, and are slower than plain products: set emulate"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    @abstractmethod
    def forms(self) -> Forms:
        """The forms of the operands of a layer's products."""

    def convert(self, layer: Layer) -> str:
        put_product(layer.module, QuantisedProduct(self.forms(), emulate=True, multiple=self.multiple))
        return ""


class MXFP8LinearConverter(BlockConverter):
    """Products of numbers of 8 bits (e4m3), 32 of which share a power of two."""

    label, multiple = "mxfp8", 32

    @dataclass(kw_only=True, slots=True)
    class Config(BlockConverter.Config):
        recipe_name: Literal["mxfp8_rceil", "mxfp8_floor"] = "mxfp8_rceil"
        """The least power for which no number of a block is too large, or that of OCP MX 1.0, section 6.3."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    def forms(self) -> Forms:
        form = MXFP8_FORMS[self.config.recipe_name]
        pair = Pair(form, form)
        return Forms(output=pair, grad_input=pair, grad_weight=pair)


class FP4LinearConverter(BlockConverter):
    """Products of numbers of 4 bits (e2m1): NVFP4, of which 16 share a scale, or MXFP4, of which 32 do."""

    label, multiple = "fp4", 32

    @dataclass(kw_only=True, slots=True)
    class Config(BlockConverter.Config):
        recipe_name: Literal["nvfp4", "mxfp4"] = "nvfp4"
        """Blocks of 16 with a scale in e4m3 and one in fp32 for the tensor, or blocks of 32 with a power of two."""
        stochastic_rounding: bool = True
        """Gradients are rounded up or down by chance, so that small ones are not lost on the mean."""
        random_hadamard: bool = False
        """Turn both operands of a weight's gradient first, so that outliers spread over 16 numbers."""
        square_weight_blocks: bool = False
        """nvfp4: a scale for each 16 x 16 numbers of a weight, so that forward and backward see the same numbers."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if self.square_weight_blocks and self.recipe_name != "nvfp4":
                yield (
                    "square_weight_blocks",
                    f"square_weight_blocks is of nvfp4, and recipe_name {self.recipe_name} has blocks in rows alone: "
                    "set recipe_name nvfp4, or leave it off",
                )

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    def forms(self) -> Forms:
        c = self.config
        weight = f"{c.recipe_name}_square" if c.square_weight_blocks else c.recipe_name
        grad = f"{c.recipe_name}_stochastic" if c.stochastic_rounding else c.recipe_name
        return Forms(
            output=Pair(c.recipe_name, weight),
            grad_input=Pair(grad, weight),
            grad_weight=Pair(grad, c.recipe_name, rotate=c.random_hadamard),
        )
