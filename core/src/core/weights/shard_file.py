"""One safetensors file, read and written a stretch at a time: no tensor is ever whole in memory for it.

A file is 8 bytes with the length of the header, the header in JSON, and the tensors, one behind the other. Those of a
type of more bytes go first, and of one type by name: the order in which the package safetensors writes them, so that
the same tensors are the same file.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from core.checkpoint.index import NAMES, TYPES, memory
from core.config.errors import UserError
from core.runtime.activity import advance

STRETCH_BYTES = 2**23
"""So much of a tensor is in memory at a time, or a row that is more."""
FLUSH_BYTES = 2**26
"""Bytes that are worth a way to the disk before the file is whole."""
STRETCHES_BEHIND = 3
"""So many stretches may wait to be written."""
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "U8", "BOOL")
"""Types in the order in which they stand in a file."""
READ_TYPES = TYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
}
RowSpan = slice | int | None
"""Of a tensor along axis 0: a stretch, one, which then is no axis any more, or all."""


class Header(NamedTuple):
    """What a file says about a tensor in it: `dtype` as safetensors writes it, "F32", "BF16", "U8", ..."""

    file: Path
    shape: list[int]
    dtype: str
    at: int = 0
    """Where its bytes begin in the file; 0 where they do not lie there one behind the other."""


class FileSpan(NamedTuple):
    """Bytes of a file that are copied as they are."""

    file: Path
    at: int
    n_bytes: int


class Output(NamedTuple):
    """A tensor to be written. Its size is known before its values are made."""

    key: str
    shape: list[int]
    dtype: torch.dtype
    make: Callable[[], Iterator[Tensor | FileSpan]]
    """The values, in stretches that follow one another along axis 0: on the CPU, of this type and of any shape, or
    where they stand."""

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def stretches(shape: Sequence[int], dtype: torch.dtype, block: int = 1) -> Iterator[slice]:
    """The rows of a tensor, as many whole blocks of rows at a time as `STRETCH_BYTES` hold, or one; of a tensor without
    axes there is nothing to cut."""
    n_rows = block * max(1, STRETCH_BYTES // max(1, prod(shape[1:]) * dtype.itemsize * block))
    for first in range(0, shape[0], n_rows):
        yield slice(first, min(first + n_rows, shape[0]))


def read_rows(header: Header, rows: RowSpan = None) -> Tensor:
    """The values of a stored tensor, or of rows of it; nothing else is read. Raises `UserError` where it cannot be."""
    dtype, shape, at = READ_TYPES[header.dtype], header.shape, header.at
    if rows is not None:
        span = slice(rows, rows + 1) if isinstance(rows, int) else rows
        at += span.start * prod(shape[1:]) * dtype.itemsize
        shape = shape[1:] if isinstance(rows, int) else [span.stop - span.start, *shape[1:]]
    values = torch.empty(shape, dtype=dtype)
    left = memory(values)
    try:
        with open(header.file, "rb", buffering=0) as stream:
            stream.seek(at)
            while left:
                if not (n_bytes := stream.readinto(left)):
                    raise OSError(EIO, f"{len(left):,} bytes are missing at its end")
                left = left[n_bytes:]
                advance()
    except OSError as error:
        raise UserError(f"{header.file} cannot be read: {error.strerror}") from error
    return values


def write_shard(file: Path, outputs: Sequence[Output]) -> None:
    """Write these tensors as a file that is not there yet, with the permissions of any new file.

    What comes next is made while a thread writes, and another one sees that the disk gets it. Raises `UserError` when
    the file cannot be written.
    """
    ordered = sorted(outputs, key=lambda output: (ORDER.index(NAMES[output.dtype]), output.key))
    entries, end = {}, 0
    for output in ordered:
        offsets = [end, end := end + output.n_bytes]
        entries[output.key] = {"dtype": NAMES[output.dtype], "shape": output.shape, "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(file, "xb", buffering=0) as stream, BackgroundWriter(cast(BinaryIO, stream)) as writer:
            writer.write(memoryview(len(text).to_bytes(8, "little") + text))
            for output in ordered:
                n_bytes = 0
                for part in output.make():
                    if isinstance(part, FileSpan):
                        n_bytes += part.n_bytes
                        writer.copy(part)
                    else:
                        n_bytes += part.nbytes
                        writer.write(memory(part.contiguous()))
                assert n_bytes == output.n_bytes, f"{output.key} has {n_bytes:,} bytes, not {output.n_bytes:,}"
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


class BackgroundWriter:
    """Writes to a file without a buffer in a thread of its own, and lets what was written reach the disk in another."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self._writer, self._flusher = ThreadPoolExecutor(1, "writing"), ThreadPoolExecutor(1, "flushing")
        self._waiting: deque[Future[None]] = deque()
        self._flushed: Future[None] | None = None
        self._n_bytes = 0

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
            if self._flushed is not None and kind is None:
                self._flushed.result()
        finally:
            for pool in (self._writer, self._flusher):
                pool.shutdown(cancel_futures=True)

    def write(self, data: memoryview) -> None:
        """Write bytes that stay as they are. Raises what went wrong with those before."""
        self._submit(self._write, data)

    def copy(self, span: FileSpan) -> None:
        """Write bytes of another file, which the system copies: none of them comes here. Raises as `write` does, and
        `UserError` where they cannot be read."""
        self._submit(self._copy, span)

    def _submit(self, do: Callable[..., None], *what: Any) -> None:
        self._waiting.append(self._writer.submit(do, *what))
        if len(self._waiting) > STRETCHES_BEHIND:
            self._waiting.popleft().result()

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[(n_bytes := self.stream.write(data)) :]
            self._advance(n_bytes)

    def _copy(self, span: FileSpan) -> None:
        try:
            source = open(span.file, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{span.file} cannot be read: {error.strerror}") from error
        with source:
            at, left = span.at, span.n_bytes
            while left:
                n_bytes = os.sendfile(self.stream.fileno(), source.fileno(), at, min(left, STRETCH_BYTES))
                if not n_bytes:
                    raise UserError(f"{span.file} cannot be read: {left:,} bytes are missing at its end")
                at, left = at + n_bytes, left - n_bytes
                self._advance(n_bytes)

    def _advance(self, n_bytes: int) -> None:
        advance()
        self._n_bytes += n_bytes
        if self._n_bytes > FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
            self._n_bytes = 0
            self._flushed = self._flusher.submit(os.fdatasync, self.stream.fileno())
