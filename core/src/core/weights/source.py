"""The weights of a model in a folder: checked to be all there before any is read, and read piece by piece."""

import logging
from collections.abc import Sequence, Set
from functools import reduce
from math import lcm, prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.checkpoint.find import Found
from core.checkpoint.index import NAMES
from core.config.errors import UserError, at_most
from core.weights.files import Folder
from core.weights.key_map import KeyMap, KeyPart
from core.weights.prefix import renamed
from core.weights.quantised import EncodedWeight, stored_weights
from core.weights.saved import Saved
from core.weights.schemes import check_keys
from core.weights.shard_file import FileSpan, Header, RowSpan, stretches

log = logging.getLogger("armature")

MOST_PROBLEMS = 30
"""So many problems are listed."""


class StoredFiles(Protocol):
    """Stored tensors by key, whatever their files are."""

    headers: dict[str, Header]
    promised: dict[str, str]
    """The file of a key that ought to be there."""

    def read(self, key: str, rows: RowSpan = None) -> Tensor: ...


class WeightSource:
    """The weights of a model in a folder, which was found to hold them all, whatever the types they are stored in.

    Raises one `UserError` that names files and keys: what is missing, unknown, wrongly shaped, given in two forms,
    stored in few bits without its scales, or tied in the model and not equal here.
    """

    def __init__(
        self, key_map: KeyMap, path: str | Path | Found | StoredFiles, *, may_lack: Set[str] = frozenset()
    ) -> None:
        """`may_lack` are weights of which none need be there; where none is, they are not looked for, and a line says
        so."""
        self.folder: StoredFiles
        if isinstance(path, Found):
            self.folder = Saved(path)
        else:
            self.folder = Folder(path) if isinstance(path, str | Path) else path
        if isinstance(self.folder, Folder):
            check_keys(self.folder.headers, path)
            if names := renamed(self.folder.headers, key_map.keys(), path):
                self.folder.rename(names)
                old, new = next((old, new) for old, new in sorted(names.items()) if old != new)
                log.info(f"{path}: keys are read under other names, {old} as {new}")
        of_model, found = key_map.keys(), self.folder.headers.items()
        headers = {key: header for key, header in found if key in of_model or not key_map.ignores(key)}
        self.stored = stored_weights(headers)
        if may_lack and not any(part.key in self.stored for name in may_lack for part in key_map.places[name][0]):
            log.info(f"{path} has none of the {len(may_lack)} weights of multi-token prediction: they are not loaded")
            key_map = key_map.without(may_lack)
        self.key_map = key_map
        problems: list[str] = []
        self.pieces: dict[str, list[KeyPart]] = {}
        """Where each of our weights stands; those that need not be there may be missing."""
        for name, places in key_map.places.items():
            problems += self._choose(name, places)
        known = key_map.keys()
        unknown = (stored for key, stored in self.stored.items() if key not in known)
        problems += [f"{self._file(stored)}: {stored.keys[0]} is unknown to {key_map.owner}" for stored in unknown]
        if not problems:
            problems = self._unequal()
        if problems:
            lines = at_most(MOST_PROBLEMS, sorted(set(problems)))
            raise UserError("\n  ".join([f"{path} does not fit the model:", *lines]))

    def dtype(self, name: str) -> torch.dtype:
        """The type that holds what is stored of one of our weights; bfloat16 for fewer bits."""
        return reduce(torch.promote_types, {self.stored[piece.key].dtype for piece in self.pieces[name]})

    def in_few_bits(self) -> str | None:
        """The first of the stored weights, by name, that is in fewer bits than it is read in; None if there is none."""
        return next((name for name, stored in sorted(self.stored.items()) if len(stored.keys) > 1), None)

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A stored weight, or one row of it, or a stretch of whole blocks of its rows; decoded."""
        stored = self.stored[key]
        if not isinstance(rows, slice):
            return stored.decode(*(self.folder.read(part, rows) for part in stored.keys))
        spans = (slice(rows.start // size, -(-rows.stop // size)) for size in stored.blocks)
        return stored.decode(*map(self.folder.read, stored.keys, spans))

    def span(self, key: str, dtype: torch.dtype) -> FileSpan | None:
        """Where the bytes of a stored weight stand, if they are its values in this type, one behind the other."""
        first, *more = self.stored[key].keys
        header = self.folder.headers[first]
        if more or not header.at or header.dtype != NAMES.get(dtype):
            return None
        return FileSpan(header.file, header.at, prod(header.shape) * dtype.itemsize)

    def reads_rows(self, name: str) -> bool:
        """Whether the values of a stretch of rows of our weight are read without the others."""
        return all(piece.row is not None for piece in self.pieces[name])

    def row_block(self, name: str) -> int | None:
        """How many rows of our weight, from a multiple of as many on, are read without the others; None for all."""
        first, *more = self.pieces[name]
        stored, shape = self.stored[first.key], self.key_map.weights[name].shape
        if more or not shape or not stored.blocks or first != KeyPart(first.key, head_dim=first.head_dim):
            return None
        return lcm(*stored.blocks, first.head_dim or 1)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """The values of rows of our weight, of any shape, which are whole blocks of `row_block` or its last ones."""
        [piece] = self.pieces[name]
        return piece.view(self.read(piece.key, rows)).reshape(-1, *self.key_map.weights[name].shape[1:])

    def plain_key(self, name: str) -> str | None:
        """The key of a stored tensor that is our weight as it is; None where there is none."""
        first, *more = self.pieces[name]
        return first.key if not more and self._is_plain(first, name) else None

    def _is_plain(self, piece: KeyPart, name: str) -> bool:
        """Whether our weight is stored as it is."""
        shape, stored = self.key_map.weights[name].shape, self.stored[piece.key]
        whole = len(stored.keys) == 1 and len(shape) > 0 and stored.shape == list(shape)
        return whole and piece == KeyPart(piece.key)

    @torch.no_grad()
    def fill(self, name: str, part: Tensor, start: Sequence[int] = ()) -> Tensor:
        """Copy the stored values of our weight, of any shape, or of the box of it that begins at `start`, into `part`,
        cast to its type. Of a weight that is stored as it is, or row by row as experts are, no other rows are read."""
        start = start or (0,) * part.dim()
        shape = self.key_map.weights[name].shape
        box = [slice(first, first + size) for first, size in zip(start, part.shape, strict=True)]
        for piece in self.pieces[name]:
            if piece.row is None and self._is_plain(piece, name):
                part.copy_(self.read(piece.key, box[0])[(slice(None), *box[1:])])
            elif piece.row is None:
                part.copy_(piece.view(self.read(piece.key, piece.stored_row)).reshape(shape)[tuple(box)])
            elif box[0].start <= piece.row < box[0].stop:
                values = piece.view(self.read(piece.key, piece.stored_row)).reshape(shape[1:])
                part[piece.row - box[0].start].copy_(values[tuple(box[1:])])
        return part

    def _choose(self, name: str, places: list[list[KeyPart]]) -> list[str]:
        """Settle where one of our weights stands; returns what is wrong with it."""
        given = [pieces for pieces in places if any(piece.key in self.stored for piece in pieces)]
        if len(given) > 1:
            twice = [next(piece.key for piece in pieces if piece.key in self.stored) for pieces in given]
            return [f"{name} is given twice: " + ", ".join(f"{self._file(self.stored[key])}: {key}" for key in twice)]
        if not given and name in self.key_map.optional:
            return []
        self.pieces[name] = (given or places)[0]
        missing = list(dict.fromkeys(piece.key for piece in self.pieces[name] if piece.key not in self.stored))
        if missing:
            more = f", and {len(missing) - 1} more that make up {name}" if len(missing) > 1 else ""
            file = self.folder.promised.get(missing[0])
            return [f"{missing[0]} is missing{f' in {file}, where the index has it' if file else ''}{more}"]
        problems = []
        for piece in self.pieces[name]:
            wanted, stored = piece.stored_shape(self.key_map.weights[name].shape), self.stored[piece.key]
            if stored.problem:
                problems.append(f"{self._file(stored)}: {stored.keys[0]} {stored.problem}")
            elif stored.shape != wanted:
                shapes = f"has shape {stored.shape}, the model wants {wanted}"
                problems.append(f"{self._file(stored)}: {piece.key} {shapes}")
        return problems

    def _unequal(self) -> list[str]:
        """Repeated keys whose values are not those of the weight that they repeat."""
        problems = []
        for key, name in (self.key_map.repeats | self.key_map.copies).items():
            if key not in self.stored:
                continue
            source = self.pieces[name][0].key
            if not self._equal(key, source):
                message = f"{key} differs from {source}, which the model ties it to"
                problems.append(f"{self._file(self.stored[key])}: {message}")
        return problems

    def _equal(self, key: str, source: str) -> bool:
        """Whether two stored weights have the same values, in the type of the second."""
        stored = self.stored[source]
        by_rows = len(self.stored[key].keys) == len(stored.keys) == 1 and len(stored.shape) > 0
        for rows in stretches(stored.shape, torch.float32) if by_rows else [None]:
            values = self.read(source, rows)
            if not torch.equal(self.read(key, rows).to(values.dtype), values):
                return False
        return True

    def _file(self, stored: EncodedWeight) -> str:
        return self.folder.headers[stored.keys[0]].file.name
