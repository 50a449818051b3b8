"""LoRA: a published model is trained on by low-rank adapters, and its own weights stay as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from core.config.configurable import range_problems
from core.nn.adapter import ADAPTER_WEIGHTS, add_adapter
from core.nn.decoder import Decoder
from core.nn.grouped import GroupedLinear
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
        """Train the length of each row of a weight apart from its direction (arXiv:2402.09353); not of experts."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from range_problems(self, rank=2**14)
            if not 0 < self.alpha < inf:
                yield "alpha", f"alpha {self.alpha} must be a finite number above 0"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Converter

    def convert(self, layer: Layer) -> str:
        c = self.config
        if c.rank > min(layer.sizes):
            return f"{layer.sizes[0]:,} x {layer.sizes[1]:,} has no rank {c.rank:,}"
        if c.dora and isinstance(layer.module, GroupedLinear):
            return "dora is not for experts"
        add_adapter(layer.module, c.rank, c.alpha / c.rank, magnitude=c.dora)
        return ""

    def after(self, model: Decoder) -> None:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.rpartition(".")[2] in ADAPTER_WEIGHTS)
