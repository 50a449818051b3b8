"""The safetensors files of a folder: one, or several with an index. What is in them, single tensors, and new ones."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.config.errors import UserError, at_most

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Header(NamedTuple):
    """What a file says about a tensor in it: `dtype` as safetensors writes it, "F32", "BF16", "U8", ..."""

    file: Path
    shape: list[int]
    dtype: str


class Folder:
    """The safetensors files of a folder; their headers are read at once, tensors when they are asked for.

    Raises `UserError` for a missing or unreadable file, and for a key that stands in two files.
    """

    def __init__(self, path: str | Path) -> None:
        self._open = lru_cache(maxsize=2)(partial(safe_open, framework="pt"))
        self.path = Path(path)
        self.promised = indexed(self.path / INDEX)
        """The name of the file that has a key, as the index tells."""
        self.headers: dict[str, Header] = {}
        for file in files(self.path, self.promised):
            for key, header in self._headers(file):
                if key in self.headers:
                    raise UserError(f"{key} stands in {self.headers[key].file.name} and in {file.name}")
                self.headers[key] = header

    def read(self, key: str, row: int | None = None) -> Tensor:
        """A stored tensor, or one row of it; nothing else of it is read."""
        tensors = self._open(self.headers[key].file)
        return tensors.get_tensor(key) if row is None else tensors.get_slice(key)[row]

    def _headers(self, file: Path) -> Iterator[tuple[str, Header]]:
        try:
            tensors = self._open(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        for key in tensors.keys():
            stored = tensors.get_slice(key)
            yield key, Header(file, list(stored.get_shape()), stored.get_dtype())


def files(folder: Path, promised: Mapping[str, str]) -> list[Path]:
    """The files that hold the promised keys, or else the single one. Raises `UserError` where one is missing."""
    names = sorted(set(promised.values())) or [SINGLE]
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{folder / INDEX} names {outside[0]!r}, which is not a file beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        keys = at_most(1, [key for key, name in promised.items() if name in missing])
        of_them = f", which the index wants for {', '.join(keys)}" if keys else ""
        raise UserError(f"{folder} has no {', '.join(missing)}{of_them}")
    return [folder / name for name in names]


def indexed(index: Path) -> dict[str, str]:
    """The name of the file of each key, as an index tells; none where there is no index."""
    try:
        text = index.read_bytes() if index.exists() else b'{"weight_map": {}}'
        return {key: str(name) for key, name in json.loads(text)["weight_map"].items()}
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} has no weight_map of keys to files: {error!r}") from error


class Output(NamedTuple):
    """A tensor to be written. Its size is known before its values are made."""

    key: str
    shape: list[int]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """The values, in this shape and type, on the CPU."""

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(folder: Path, outputs: list[Output], shard_gib: float, say: Callable[[str], object] | None = None) -> None:
    """Write the tensors as one safetensors file, or as several with an index: at most `shard_gib` in a file unless one
    tensor alone is more. One file's tensors are in memory at a time; `say` is told each file that is done.

    Raises `UserError` when a file cannot be written."""
    shards = list(cut(outputs, shard_gib * 2**30))
    place: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        try:
            save_file({output.key: output.make() for output in shard}, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {folder / name}: {error}") from error
        place |= {output.key: name for output in shard}
        if say is not None:
            say(f"{name}: {len(shard)} tensors, {sum(output.n_bytes for output in shard) / 2**30:.2f} GiB")
    if len(shards) > 1:
        size = sum(output.n_bytes for output in outputs)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def cut(outputs: list[Output], limit: float) -> Iterator[list[Output]]:
    """The tensors in order, cut so that no part exceeds `limit` bytes unless one tensor alone does."""
    shard: list[Output] = []
    size = 0
    for output in outputs:
        if shard and size + output.n_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(output)
        size += output.n_bytes
    yield shard
