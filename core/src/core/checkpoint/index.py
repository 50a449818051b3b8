"""Where the pieces of every tensor of a checkpoint stand, and tensors put together from them, without any process
group.

    tensors.json              {"layers.0.attention.wq.weight": {"dtype": "F32", "shape": [8, 4], "pieces": [
    rank-00000.safetensors      {"file": "rank-00000.safetensors", "at": 1024, "start": [0, 0], "shape": [4, 4]},
    rank-00001.safetensors      {"file": "rank-00001.safetensors", "at": 960, "start": [4, 0], "shape": [4, 4]}]}, ...}
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.checkpoint.manifest import TENSORS, Damaged, Written, entries
from core.checkpoint.storage import Storage
from core.config.errors import UserError, at_most
from core.config.json_file import parse_json, typed

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names that safetensors has for them."""
NAMES = {dtype: name for name, dtype in TYPES.items()}
ENTRY = {"dtype": str, "shape": list[int], "pieces": list[dict[str, Any]]}
PIECE = {"file": str, "at": int, "start": list[int], "shape": list[int]}
MOST_HEADER = 100 * 2**20
"""Bytes that a header may have, as safetensors has it, too."""
Box = tuple[Sequence[int], Sequence[int]]


class StoredBox(NamedTuple):
    """A box of a tensor: its first index and its shape, and where its bytes begin in a file."""

    file: str
    at: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, and the pieces that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredBox, ...]


def read_index(storage: Storage, folder: str, files: Mapping[str, Written]) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint with these files by name; raises `Damaged` for an index that is none."""
    most_mib = files[TENSORS].n_bytes // 2**20 + 1
    try:
        said = parse_json(storage.read(f"{folder}/{TENSORS}"), TENSORS, most_mib)
        index = {name: stored_of(entry, f"{TENSORS}: {name}") for name, entry in said.items()}
    except UserError as error:
        raise Damaged(str(error)) from error
    if wrong := index_problems(index, {name: file.n_bytes for name, file in files.items()}):
        raise Damaged("; ".join(at_most(5, wrong)))
    return index


def stored_of(said: Any, name: str) -> StoredTensor:
    """A tensor from what stands in an index; raises `UserError` where that is none."""
    said = entries(typed(said, dict[str, Any], name), ENTRY, name, needed=ENTRY.keys())
    if said["dtype"] not in TYPES:
        raise UserError(f"{name}: dtype {said['dtype']!r} is none of {', '.join(TYPES)}")
    pieces = []
    for piece in said["pieces"]:
        piece = entries(piece, PIECE, name, needed=PIECE.keys())
        pieces.append(StoredBox(piece["file"], piece["at"], tuple(piece["start"]), tuple(piece["shape"])))
    return StoredTensor(TYPES[said["dtype"]], tuple(said["shape"]), tuple(pieces))


def index_problems(index: Mapping[str, StoredTensor], n_bytes: Mapping[str, int]) -> list[str]:
    """Where pieces do not make up their tensor, each element once, or lie outside files of these sizes, or in the bytes
    of another."""
    wrong: list[str] = []
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for name, stored in index.items():
        if not all(0 <= size < 2**63 for size in stored.shape):
            wrong.append(f"{TENSORS}: {name}: {list(stored.shape)} is no shape")
        elif not tiles([(piece.start, piece.shape) for piece in stored.pieces], stored.shape):
            wrong.append(f"{TENSORS}: {name}: its pieces do not make up a tensor of shape {list(stored.shape)}")
        for piece in stored.pieces:
            end = piece.at + prod(piece.shape) * stored.dtype.itemsize
            ranges.setdefault(piece.file, []).append((piece.at, end, name))
            if piece.file not in n_bytes:
                wrong.append(f"{TENSORS}: {name}: {piece.file!r} is no file of this checkpoint")
            elif not 8 <= piece.at <= end <= n_bytes[piece.file]:
                wrong.append(
                    f"{TENSORS}: {name}: bytes {piece.at:,} to {end:,} are not in {piece.file}, which has "
                    f"{n_bytes[piece.file]:,}"
                )
    for file, used in ranges.items():
        for (_, end, name), (at, _, other) in pairwise(sorted(range for range in used if range[0] < range[1])):
            if at < end:
                wrong.append(f"{TENSORS}: {name} and {other} share bytes of {file}")
    return wrong


def tiles(boxes: Sequence[Box], shape: Sequence[int], dim: int = 0) -> bool:
    """Whether boxes, each a first index and a shape, fill a shape with every element in one of them.

    They must come from cutting one dimension after another, as every layout of ranks does.
    """
    if dim == 0 and any(len(start) != len(shape) or len(size) != len(shape) for start, size in boxes):
        return False
    boxes = [box for box in boxes if 0 not in box[1]]
    if 0 in shape[dim:]:
        return not boxes
    if dim == len(shape):
        return len(boxes) == 1
    groups: dict[tuple[int, int], list[Box]] = {}
    for start, size in boxes:
        groups.setdefault((start[dim], size[dim]), []).append((start, size))
    end = 0
    for (first, size), group in sorted(groups.items()):
        if first != end or size < 0 or not tiles(group, shape, dim + 1):
            return False
        end += size
    return end == shape[dim]


def header_problems(
    storage: Storage, folder: str, index: Mapping[str, StoredTensor], files: Iterable[str]
) -> list[str]:
    """Where these files, of those that hold pieces, say otherwise of them than the index."""
    pieces: dict[str, dict[str, Any]] = {}
    for name, stored in index.items():
        for piece in stored.pieces:
            said = {"dtype": NAMES[stored.dtype], "shape": list(piece.shape)}
            n_bytes = prod(piece.shape) * stored.dtype.itemsize
            pieces.setdefault(piece.file, {})[key_of(name, piece.start)] = said, piece.at, piece.at + n_bytes
    wrong = []
    for file in sorted(pieces.keys() & set(files)):
        try:
            header, begin = read_header(storage, f"{folder}/{file}", file)
        except UserError as error:
            wrong.append(str(error))
            continue
        for key in sorted(header.keys() | pieces[file].keys()):
            said, first, last = pieces[file].get(key, ({}, begin, begin))
            if header.get(key) != {**said, "data_offsets": [first - begin, last - begin]}:
                wrong.append(f"{file} has {key} as {header.get(key, 'nothing')}, {TENSORS} as {said or 'nothing'}")
    return wrong


def key_of(name: str, start: Iterable[int]) -> str:
    """The name of a piece in its file."""
    return f"{name}@{','.join(map(str, start))}"


def read_header(storage: Storage, path: str, file: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin. Raises `UserError` where there is none."""
    length = bytearray(8)
    storage.read_into(memoryview(length), path, 0)
    n_bytes = int.from_bytes(length, "little")
    if n_bytes > min(storage.size(path) - 8, MOST_HEADER):
        raise UserError(f"{file} has no header: {n_bytes:,} bytes of one are not in it")
    text = bytearray(n_bytes)
    storage.read_into(memoryview(text), path, 8)
    header = parse_json(bytes(text), f"{file}: header", MOST_HEADER // 2**20)
    header.pop("__metadata__", None)
    return header, 8 + n_bytes


def index_text(index: dict[str, StoredTensor]) -> str:
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
    """The bytes of a contiguous tensor of the host, of any shape."""
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def read_piece(storage: Storage, folder: str, dtype: torch.dtype, piece: StoredBox) -> Tensor:
    """The values of a piece."""
    values = torch.empty(piece.shape, dtype=dtype)
    if values.numel():
        storage.read_into(memory(values), f"{folder}/{piece.file}", piece.at)
    return values


def read_tensor(storage: Storage, folder: str, stored: StoredTensor, rows: slice | int | None = None) -> Tensor:
    """A tensor put together from its pieces, or a stretch of its rows, or one of them: nothing else is read."""
    if isinstance(rows, int):
        return read_tensor(storage, folder, stored, slice(rows, rows + 1))[0]
    first, last = (0, None) if rows is None else (rows.start, rows.stop)
    shape = stored.shape if last is None else (last - first, *stored.shape[1:])
    whole = torch.empty(shape, dtype=stored.dtype)
    for piece in stored.pieces:
        if last is not None:
            begin, end = max(first, piece.start[0]), min(last, piece.start[0] + piece.shape[0])
            if begin >= end:
                continue
            at = piece.at + (begin - piece.start[0]) * prod(piece.shape[1:]) * stored.dtype.itemsize
            piece = StoredBox(piece.file, at, (begin - first, *piece.start[1:]), (end - begin, *piece.shape[1:]))
        box = tuple(slice(start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))
        whole[box] = read_piece(storage, folder, stored.dtype, piece)
    return whole
