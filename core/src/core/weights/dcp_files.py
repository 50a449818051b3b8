"""Folders of `torch.distributed.checkpoint` that others wrote, read without running anything that stands in them.

`.metadata` is a pickle. A pickle names classes and calls them; here every name stands for a record that keeps its state
alone, so nothing is imported and nothing is run, whoever wrote the file. The values lie in other files, each a tensor
that `torch.save` wrote at a place that the metadata tell, and are read by `torch.load(weights_only=True)`.
"""

import io
import pickle
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.checkpoint.index import NAMES, TYPES, tiles
from core.config.errors import UserError
from core.config.links import file_in
from core.config.text_file import read_bytes
from core.weights.shard_file import Header, RowSpan

METADATA = ".metadata"
MOST_METADATA_MIB = 4096


class PickledObject:
    """What a pickle says of the state of an object of some class."""

    name = ""
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Whatever a pickle gives to the class is passed over."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str) -> Any:
        """One of the fields."""
        if not isinstance(self.state, dict) or key not in self.state:
            raise UserError(f"a {self.name} without {key}")
        return self.state[key]

    def get_or_none(self, key: str) -> Any:
        """One of the fields; None where it is not stated, as those that are None are not."""
        return self.state.get(key) if isinstance(self.state, dict) else None


class InertUnpickler(pickle.Unpickler):
    """An unpickler for which every class and function is a `PickledObject`; sizes are tuples, and PyTorch's types are
    themselves."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        return type(name, (PickledObject,), {"name": name})


class Chunk(NamedTuple):
    """A box of a tensor: its first index and shape, and the bytes of a file that hold it."""

    file: str
    at: int
    n_bytes: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


class DcpFiles:
    """The tensors of such a folder, by their names in it; what is no tensor is left out.

    Raises `UserError` for a folder that is none, or whose metadata are not understood.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (file := file_in(folder, METADATA)) is None:
            raise UserError(f"{folder} has no {METADATA}: it is no folder of torch.distributed.checkpoint")
        try:
            said = InertUnpickler(io.BytesIO(read_bytes(file, MOST_METADATA_MIB))).load()
            self.chunks, self.headers = tensors_of(said, folder)
        except UserError as error:
            raise UserError(f"{file} is not understood: {error}") from error
        except Exception as error:  # a pickle that is damaged raises whatever it meets
            raise UserError(f"{file} is damaged: {error!r}") from error
        self.promised: dict[str, str] = {}
        self._load = lru_cache(maxsize=2)(self._load_chunk)

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A tensor, or rows of it, for which only chunks with those are read."""
        if isinstance(rows, int):
            return self.read(key, slice(rows, rows + 1))[0]
        header = self.headers[key]
        shape = header.shape if rows is None else [rows.stop - rows.start, *header.shape[1:]]
        whole = torch.empty(shape, dtype=TYPES[header.dtype])
        for chunk in self.chunks[key]:
            box = tuple(slice(first, first + size) for first, size in zip(chunk.start, chunk.shape, strict=True))
            if rows is None:
                whole[box] = self._load(chunk)
                continue
            begin, end = max(rows.start, box[0].start), min(rows.stop, box[0].stop)
            if begin < end:
                values = self._load(chunk)[begin - box[0].start : end - box[0].start]
                whole[(slice(begin - rows.start, end - rows.start), *box[1:])] = values
        return whole

    def _load_chunk(self, chunk: Chunk) -> Tensor:
        if (file := file_in(self.folder, chunk.file)) is None:
            raise UserError(f"{self.folder} has no {chunk.file}, which its {METADATA} names")
        with file.open("rb") as stream:
            stream.seek(chunk.at)
            content = stream.read(chunk.n_bytes)
        try:
            values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises is any of a dozen
            raise UserError(f"{file} cannot be read at byte {chunk.at:,}: {error}") from error
        if not isinstance(values, Tensor) or tuple(values.shape) != chunk.shape:
            raise UserError(f"{file} holds something else at byte {chunk.at:,} than a tensor of {list(chunk.shape)}")
        return values


def tensors_of(said: Any, folder: Path) -> tuple[dict[str, list[Chunk]], dict[str, Header]]:
    """The chunks and the header of every tensor that metadata describe; raises `UserError` for what they lack."""
    if not isinstance(said, PickledObject):
        raise UserError("it holds no Metadata")
    places: dict[tuple[str, tuple[int, ...]], PickledObject] = {}
    for index, info in dict(said.get("storage_data") or {}).items():
        places[index.get("fqn"), tuple(index.get_or_none("offset") or ())] = info
    chunks: dict[str, list[Chunk]] = {}
    headers: dict[str, Header] = {}
    for key, entry in dict(said.get("state_dict_metadata")).items():
        if entry.name != "TensorStorageMetadata":
            continue
        dtype, shape = entry.get("properties").state[0], tuple(entry.get("size"))
        if dtype not in NAMES:
            continue
        found = []
        for each in entry.get("chunks"):
            start, size = tuple(each.get("offsets")), tuple(each.get("sizes"))
            info = places.get((key, start)) or places.get((key, ()))
            if info is None:
                raise UserError(f"{key} has no place for its part at {list(start)}")
            if transforms := info.get_or_none("transform_descriptors"):
                raise UserError(f"{key} is stored by {transforms}, which is not read")
            found.append(Chunk(info.get("relative_path"), info.get("offset"), info.get("length"), start, size))
        if not tiles([(chunk.start, chunk.shape) for chunk in found], shape):
            raise UserError(f"the parts of {key} do not make up a tensor of shape {list(shape)}")
        chunks[key] = found
        headers[key] = Header(folder / (found[0].file if found else METADATA), list(shape), NAMES[dtype])
    return chunks, headers
