"""Weights of a model with adapters merged into them: those of a run that trained adapters alone, or of peft's."""

from abc import ABC, abstractmethod
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.find import Found
from core.checkpoint.index import NAMES
from core.nn.adapter import ADAPTER_WEIGHTS
from core.nn.init import LocalSlice
from core.nn.nf4 import from_nf4, to_nf4
from core.nn.weights import NF4_BLOCK, NF4_BLOCK_BYTES
from core.weights.saved import Saved
from core.weights.shard_file import Header, RowSpan
from core.weights.source import WeightSource

CLASS = "core.quantization.lora:LoRAConverter"


def adapter_settings(run: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the adapters of a run, by what its `config.json` states; None where it has none."""
    found = (each for each in run.get("converters", []) if isinstance(each, dict) and each.get("class") == CLASS)
    return next(found, None)


@torch.no_grad()
def begin_with(source: WeightSource, name: str, piece: LocalSlice) -> None:
    """Fill a piece of a weight, of any shape, with what `source` has there, made few bits where it is kept in bytes.

    Of a stack of matrices one is in memory at a time.
    """
    value, start = piece
    if value.dtype != torch.uint8:
        source.fill(name, value, start)
        return
    first, *more, column = start
    for i, box in enumerate(value.split(1)) if value.dim() == 3 else [(0, value)]:
        n_in, at = box.shape[-1] // NF4_BLOCK_BYTES * NF4_BLOCK, column // NF4_BLOCK_BYTES * NF4_BLOCK
        values = torch.empty(*box.shape[:-1], n_in, dtype=torch.float32, device=box.device)
        box.copy_(to_nf4(source.fill(name, values, (first + i, *more, at))))


def in_training(weight: Tensor, *, quantised: bool) -> Tensor:
    """In fp32 what rows of a weight (..., I) were to the adapter that learned beside them."""
    return from_nf4(to_nf4(weight), torch.float32) if quantised else weight.float()


class Adapters(ABC):
    """Adapters of layers of a model, by our names and in our order of rows, wherever they are kept."""

    layers: Set[str]
    """The layers that have one."""
    quantised: bool = False
    """Whether they were trained beside weights in few bits."""

    @abstractmethod
    def scale(self, layer: str) -> float:
        """What the product of a layer's two matrices is multiplied by."""

    @abstractmethod
    def read(self, layer: str, leaf: str, rows: RowSpan = None) -> Tensor | None:
        """`lora_a` (r, I) or (G, r, I), `lora_b` (O, r) or (G, O, r), `magnitude` (O,) or (G, O), or rows of it; None
        for lengths where there are none."""


class SavedAdapters(Adapters):
    """The adapters in a checkpoint of a run, whose `config.json` states `run`."""

    def __init__(self, found: Found, run: dict[str, Any]) -> None:
        self.found, self.saved, settings = found, Saved(found), adapter_settings(run)
        assert settings is not None, "a run without adapters"
        self.settings = settings
        self.layers = {name.removesuffix(".lora_a") for name in self.saved.headers if name.endswith(".lora_a")}
        self.quantised = settings.get("quantize_base", False)

    def __str__(self) -> str:
        return str(self.found)

    def scale(self, layer: str) -> float:
        return self.settings["alpha"] / self.settings["rank"]

    def read(self, layer: str, leaf: str, rows: RowSpan = None) -> Tensor | None:
        name = f"{layer}.{leaf}"
        return self.saved.read(name, rows).float() if name in self.saved.headers else None


class MergedWeights:
    """The weights of a model as if each adapter had been added to its weight: W + scale B A, with the rows of that at
    their lengths where there is a magnitude. They are read and merged row by row.

    A weight that was trained beside in few bits is taken as these say it: so the merged model is the one that learned.
    """

    def __init__(self, adapters: Adapters, base: WeightSource) -> None:
        """`base` has the weights without adapters, by our names."""
        self.adapters, self.base = adapters, base
        self.promised: dict[str, str] = {}
        shapes = {name: list(base.key_map.weights[name].shape) for name in base.pieces}
        self.headers = {
            name: Header(Path(str(adapters)), shape, NAMES[base.dtype(name)]) for name, shape in shapes.items()
        }
        self.saved = adapters.saved if isinstance(adapters, SavedAdapters) else None
        own = self.saved.headers if self.saved is not None else {}
        self.own = {name for name in own if name.rpartition(".")[2] not in ADAPTER_WEIGHTS}
        self.headers |= {name: own[name] for name in self.own}

    def __str__(self) -> str:
        return f"{self.adapters} with the weights that it began with"

    @torch.no_grad()
    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A weight, or rows of it."""
        if self.saved is not None and key in self.own:
            return self.saved.read(key, rows)
        shape, dtype = self.headers[key].shape, self.base.dtype(key)
        if not shape:
            return self.base.fill(key, torch.empty(shape, dtype=dtype))
        span = slice(rows, rows + 1) if isinstance(rows, int) else rows or slice(0, shape[0])
        part = torch.empty([span.stop - span.start, *shape[1:]], dtype=dtype)
        part = self.base.fill(key, part, (span.start, *[0] * (len(shape) - 1)))
        layer = key.removesuffix(".weight")
        if layer in self.adapters.layers:
            part = self._merged(layer, in_training(part, quantised=self.adapters.quantised), span).to(dtype)
        return part[0] if isinstance(rows, int) else part

    def _merged(self, layer: str, weight: Tensor, rows: slice) -> Tensor:
        """Rows (rows, I) of a weight with its adapter, or experts (rows, O, I)."""
        a = self.adapters.read(layer, "lora_a", rows if weight.dim() == 3 else None)
        b = self.adapters.read(layer, "lora_b", rows)
        assert a is not None and b is not None, layer
        merged = weight + self.adapters.scale(layer) * (b @ a)
        if (magnitude := self.adapters.read(layer, "magnitude", rows)) is None:
            return merged
        return (magnitude * weight.norm(dim=-1) / merged.norm(dim=-1)).unsqueeze(-1) * merged
