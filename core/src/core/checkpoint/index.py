"""Where the pieces of every tensor of a checkpoint stand, and tensors put together from them, without any process
group.

    tensors.json              {"layers.0.attention.wq.weight": {"dtype": "F32", "shape": [8, 4], "pieces": [
    rank-00000.safetensors      {"file": "rank-00000.safetensors", "at": 1024, "start": [0, 0], "shape": [4, 4]},
    rank-00001.safetensors      {"file": "rank-00001.safetensors", "at": 960, "start": [4, 0], "shape": [4, 4]}]}, ...}
"""

import json
import re
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from core.checkpoint.manifest import TENSORS
from core.checkpoint.quantised import FLOATS
from core.checkpoint.storage import Storage
from core.config.errors import UserError

TYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names that safetensors has for them."""
NAMES = {dtype: name for name, dtype in TYPES.items()}


class Piece(NamedTuple):
    """A box of a tensor: its first index and its shape, and where its bytes begin in a file."""

    file: str
    at: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, and the pieces that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def read_index(storage: Storage, folder: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name. Raises `UserError` for pieces that stand elsewhere than in its folder."""
    said = json.loads(storage.read(f"{folder}/{TENSORS}"))
    for file in {piece["file"] for entry in said.values() for piece in entry["pieces"]}:
        if not re.fullmatch(r"\w[\w.-]*", file):
            raise UserError(
                f"{storage}/{folder}/{TENSORS} names {file!r}, which is no file in the folder: do not use it"
            )
    return {
        name: Stored(
            TYPES[entry["dtype"]],
            tuple(entry["shape"]),
            tuple(
                Piece(piece["file"], piece["at"], tuple(piece["start"]), tuple(piece["shape"]))
                for piece in entry["pieces"]
            ),
        )
        for name, entry in said.items()
    }


def index_text(index: dict[str, Stored]) -> str:
    """What `read_index` reads."""
    said = {
        name: {
            "dtype": NAMES[stored.dtype],
            "shape": stored.shape,
            "pieces": [piece._asdict() for piece in stored.pieces],
        }
        for name, stored in index.items()
    }
    return json.dumps(said) + "\n"


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host."""
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def read_piece(storage: Storage, folder: str, dtype: torch.dtype, piece: Piece) -> Tensor:
    """The values of a piece."""
    values = torch.empty(piece.shape, dtype=dtype)
    if values.numel():
        storage.read_into(memory(values), f"{folder}/{piece.file}", piece.at)
    return values


def read_tensor(storage: Storage, folder: str, stored: Stored, row: int | None = None) -> Tensor:
    """A tensor put together from its pieces, or one row of it, for which only pieces with that row are read."""
    whole = torch.empty(stored.shape if row is None else stored.shape[1:], dtype=stored.dtype)
    for piece in stored.pieces:
        if row is None:
            box = tuple(slice(start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))
            whole[box] = read_piece(storage, folder, stored.dtype, piece)
        elif piece.start[0] <= row < piece.start[0] + piece.shape[0]:
            n_bytes = prod(piece.shape[1:]) * stored.dtype.itemsize
            part = Piece(piece.file, piece.at + (row - piece.start[0]) * n_bytes, piece.start[1:], piece.shape[1:])
            box = tuple(slice(start, start + size) for start, size in zip(part.start, part.shape, strict=True))
            whole[box] = read_piece(storage, folder, stored.dtype, part)
    return whole
