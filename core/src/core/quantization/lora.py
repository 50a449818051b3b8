"""LoRA: a published model is trained on by low-rank adapters, and its own weights stay as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from core.config.configurable import range_problems
from core.nn.adapter import ADAPTER_WEIGHTS, add_adapter
from core.nn.decoder import Decoder
from core.nn.nf4 import NF4Product, keep_in_nf4
from core.nn.product import ByProduct, put_product
from core.nn.weights import NF4_BLOCK
from core.quantization.converter import Converter, Layer


class LoRAConverter(Converter):
    """Adds an adapter to each layer; these alone are trained, and saved with a run."""

    label, adapts = "lora", True

    @dataclass(kw_only=True, slots=True)
    class Config(Converter.Config):
        rank: int = 8
        """Width of an adapter."""
        alpha: float = 16.0
        """What an adapter adds is multiplied by alpha / rank."""
        dora: bool = False
        """Train the length of each row of a weight apart from its direction (arXiv:2402.09353)."""
        quantize_base: bool = False
        """Keep the weights that have adapters in 4 bits, NF4 with a scale for 64 numbers (QLoRA, arXiv:2305.14314)."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from range_problems(self, rank=2**14)
            if not 0 < self.alpha < inf:
                yield "alpha", f"alpha {self.alpha} must be a finite number above 0"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    def convert(self, layer: Layer) -> str:
        c = self.config
        if c.rank > min(layer.sizes):
            return f"{layer.sizes[0]:,} x {layer.sizes[1]:,} has no rank {c.rank:,}"
        if c.quantize_base and (reason := why_not_nf4(layer)):
            return reason
        if c.quantize_base:
            put_product(layer.module, NF4Product())
        add_adapter(layer.module, c.rank, c.alpha / c.rank, magnitude=c.dora)
        if c.quantize_base:
            keep_in_nf4(layer.module)
        return ""

    def after(self, model: Decoder) -> None:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.rpartition(".")[2] in ADAPTER_WEIGHTS)


def why_not_nf4(layer: Layer) -> str:
    """Why the weight of a layer cannot be kept in 4 bits; empty where it can."""
    if isinstance(layer.module, ByProduct):
        return "another converter has its product, and quantize_base needs a plain one"
    n_in = layer.sizes[1]
    return f"{n_in:,} inputs are no multiple of {NF4_BLOCK}, which quantize_base needs" if n_in % NF4_BLOCK else ""
