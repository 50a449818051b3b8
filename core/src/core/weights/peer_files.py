"""Weights as other programs keep them: one file of `torch.save`, and nanotron's file for each tensor and rank."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.checkpoint.index import NAMES, TYPES
from core.config.errors import UserError
from core.config.links import file_in
from core.weights.shard_file import Header, RowSpan

SHARD = re.compile(r"model_(?P<leaf>\w+?)(?:_pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+)?\.safetensors")
"""A file of nanotron: the last part of a tensor's name, and the rank that wrote it."""


class TorchFile:
    """The tensors of one file that `torch.save` wrote, as litgpt's `lit_model.pth`. Nothing of it is run, and what is
    read of it stays on the disk until it is needed. Raises `UserError` for a file that is none."""

    def __init__(self, folder: Path, name: str) -> None:
        if (file := file_in(folder, name)) is None:
            raise UserError(f"{folder} has no {name}")
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # what a file of another kind raises is any of a dozen
            raise UserError(f"{file} cannot be read as tensors alone: {error}") from error
        found = found.get("model", found) if isinstance(found, Mapping) else found
        if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
            raise UserError(f"{file} holds something else than named tensors")
        self.file, self.tensors = file, dict(found)
        self.promised: dict[str, str] = {}
        self.headers = {
            key: Header(file, list(each.shape), NAMES.get(each.dtype, str(each.dtype)))
            for key, each in self.tensors.items()
        }

    def __str__(self) -> str:
        return str(self.file)

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A tensor, or rows of it."""
        return self.tensors[key] if rows is None else self.tensors[key][rows]


class NanotronFiles:
    """The tensors of a checkpoint of nanotron: a folder for each part of a name, in the last one a file for each
    tensor, or for each rank that has a part of it. Raises `UserError` for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        if (latest := file_in(folder, "latest.txt")) is not None:
            folder = folder / Path(latest.read_text().strip()).name
        self.folder, root = folder, folder / "model"
        self.parts: dict[str, list[Path]] = {}
        for file in sorted(root.rglob("*.safetensors")):
            if match := SHARD.fullmatch(file.name):
                name = ".".join([*file.parent.relative_to(root).parts, match["leaf"]])
                self.parts.setdefault(name, []).append(file)
        if not self.parts:
            raise UserError(f"{folder} has no model/**/model_*.safetensors: it is no checkpoint of nanotron")
        self.promised: dict[str, str] = {}
        self.headers = {name: self._header(files) for name, files in self.parts.items()}
        self._read = lru_cache(maxsize=4)(self._whole)

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A tensor, or rows of it."""
        return self._read(key) if rows is None else self._read(key)[rows]

    def _header(self, files: list[Path]) -> Header:
        with opened(files[0]) as tensors:
            stored, stated = tensors.get_slice("data"), tensors.metadata() or {}
            whole = stated.get("unsharded_shape")
            shape = list(stored.get_shape()) if whole is None else numbers(whole)
            return Header(files[0], shape, stored.get_dtype())

    def _whole(self, key: str) -> Tensor:
        """The tensor, put together from the parts of all ranks."""
        header = self.headers[key]
        whole = torch.empty(header.shape, dtype=TYPES[header.dtype])
        filled = 0
        for file in self.parts[key]:
            with opened(file) as tensors:
                values, stated = tensors.get_tensor("data"), tensors.metadata() or {}
            pairs = slice_pairs(stated["local_global_slices_pairs"]) if "local_global_slices_pairs" in stated else []
            for local, place in pairs or [((...,), (...,))]:
                whole[place] = values[local]
                filled += values[local].numel()
        if filled != whole.numel():
            raise UserError(f"{self.folder}: the parts of {key} hold {filled:,} values of {whole.numel():,}")
        return whole


def opened(file: Path) -> Any:
    """A safetensors file that was opened; raises `UserError` for one that cannot be."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def numbers(text: str) -> list[int]:
    """The whole numbers that a tuple is written with."""
    return [int(number) for number in re.findall(r"\d+", text)]


def slice_pairs(text: str) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Which rows and columns of a part are which of the whole, as nanotron writes them:
    "0,10,None|None,None,None#10,20,None|None,None,None", several with a ";" between them."""

    def slices(part: str) -> tuple[slice, ...]:
        ends = (each.split(",") for each in part.split("|"))
        return tuple(slice(*(None if end == "None" else int(end) for end in each)) for each in ends)

    pairs = (pair.split("#") for pair in text.split(";"))
    return [(slices(local), slices(place)) for local, place in pairs]
