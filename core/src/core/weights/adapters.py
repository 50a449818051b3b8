"""Weights of a run that trained adapters alone: those that it began with, with its adapters merged into them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.find import Found
from core.checkpoint.index import NAMES
from core.nn.adapter import ADAPTER_WEIGHTS
from core.weights.saved import Saved
from core.weights.shard_file import Header, RowSpan
from core.weights.source import WeightSource

CLASS = "core.quantization.lora:LoRAConverter"


def adapter_settings(run: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the adapters of a run, by what its `config.json` states; None where it has none."""
    found = (each for each in run.get("converters", []) if isinstance(each, dict) and each.get("class") == CLASS)
    return next(found, None)


class MergedWeights:
    """The weights of a checkpoint of adapters, as if each had been added to its weight: W + alpha / rank B A, with the
    rows of that at their lengths where there is a magnitude. They are read and merged row by row."""

    def __init__(self, found: Found, run: dict[str, Any], base: WeightSource) -> None:
        """`base` has the weights that the run began with, by our names."""
        settings = adapter_settings(run)
        assert settings is not None, "a run without adapters"
        self.found, self.base, self.saved = found, base, Saved(found)
        self.scale = settings["alpha"] / settings["rank"]
        self.promised: dict[str, str] = {}
        shapes = {name: list(base.key_map.weights[name].shape) for name in base.pieces}
        self.headers = {
            name: Header(Path(str(found)), shape, NAMES[base.dtype(name)]) for name, shape in shapes.items()
        }
        own = [name for name in self.saved.headers if name.rpartition(".")[2] not in ADAPTER_WEIGHTS]
        self.headers |= {name: self.saved.headers[name] for name in own}

    def __str__(self) -> str:
        return f"{self.found} with the weights that it began with"

    @torch.no_grad()
    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A weight, or rows of it."""
        if key in self.saved.headers:
            return self.saved.read(key, rows)
        shape, dtype = self.headers[key].shape, self.base.dtype(key)
        if not shape:
            return self.base.fill(key, torch.empty(shape, dtype=dtype))
        span = slice(rows, rows + 1) if isinstance(rows, int) else rows or slice(0, shape[0])
        part = torch.empty([span.stop - span.start, *shape[1:]], dtype=dtype)
        part = self.base.fill(key, part, (span.start, *[0] * (len(shape) - 1)))
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_a" in self.saved.headers:
            part = self._merged(layer, part.float(), span).to(dtype)
        return part[0] if isinstance(rows, int) else part

    def _merged(self, layer: str, weight: Tensor, rows: slice) -> Tensor:
        """Rows (rows, I) of a weight with its adapter, or experts (rows, O, I)."""
        a = self.saved.read(f"{layer}.lora_a", rows if weight.dim() == 3 else None).float()
        merged = weight + self.scale * (self.saved.read(f"{layer}.lora_b", rows).float() @ a)
        if f"{layer}.magnitude" not in self.saved.headers:
            return merged
        lengths = self.saved.read(f"{layer}.magnitude", rows).float() * weight.norm(dim=-1) / merged.norm(dim=-1)
        return lengths.unsqueeze(-1) * merged
