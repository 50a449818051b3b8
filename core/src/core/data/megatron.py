"""Megatron's files of tokens: a `.bin` with the ids, and an `.idx` that says where sequences and documents begin.

The index holds sequences, each with its length and its place in bytes, and the number of the first sequence of each
document and behind the last. All numbers are little-endian.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from core.config.errors import UserError
from core.data.bad_lines import reading
from core.data.shards import TokenStream
from core.runtime.disk import replace_file

MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The codes of its types that ids may have; 6 and 7 are of floats."""
_FEW_TOKENS = 65_500
"""Megatron keeps the ids of a smaller vocabulary as uint16, and else as int32."""
_CHUNK_TOKENS = 2**22


def read_megatron(index: Path, path: Path, n_bytes: int) -> tuple[np.dtype[Any], int, np.ndarray]:
    """The type of the ids in `path`, how many there are, and where documents begin, (documents + 1,), with the end.

    Raises `UserError` for an index that does not fit a file of `n_bytes`.
    """
    with reading(index):
        data = index.read_bytes()
    if not data.startswith(MAGIC) or len(data) < 34:
        raise UserError(f"{index} is no index of Megatron's")
    version, code = int.from_bytes(data[9:17], "little"), data[17]
    n, n_documents = (int.from_bytes(data[start : start + 8], "little") for start in (18, 26))
    if version != 1 or code not in MEGATRON_TYPES:
        known = ", ".join(map(str, MEGATRON_TYPES))
        raise UserError(f"{index} is of version {version} and type {code}: known are version 1 and the types {known}")
    if len(data) not in (34 + 12 * n + 8 * n_documents, 34 + 13 * n + 8 * n_documents):
        raise UserError(f"{index} has {len(data):,} bytes, not as many as {n:,} sequences in {n_documents:,} documents")
    dtype = np.dtype(MEGATRON_TYPES[code])
    lengths = np.frombuffer(data, "<i4", n, 34).astype(np.int64)
    places = np.frombuffer(data, "<i8", n, 34 + 4 * n)
    documents = np.frombuffer(data, "<i8", n_documents, 34 + 12 * n)
    firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if (lengths < 0).any() or (places != firsts[:-1] * dtype.itemsize).any():
        raise UserError(f"{index}: the sequences do not lie one behind the other")
    if (documents < 0).any() or (documents > n).any() or (documents[1:] < documents[:-1]).any():
        raise UserError(f"{index}: the documents do not ascend from 0 to {n:,}")
    n_tokens = int(firsts[-1])
    if n_bytes != n_tokens * dtype.itemsize:
        raise UserError(f"{path} has {n_bytes:,} bytes, and {index.name} says {n_tokens:,} ids of {dtype}")
    return dtype, n_tokens, firsts[documents]


def write_megatron(stream: TokenStream, prefix: Path, vocab_size: int) -> None:
    """Write a stream as `prefix`.bin and `prefix`.idx; each document is one sequence. Raises `OSError`."""
    code = 8 if vocab_size < _FEW_TOKENS else 4
    dtype, n_tokens = np.dtype(MEGATRON_TYPES[code]), stream.extent.tokens
    unfinished = prefix.with_name(f"{prefix.name}.bin.unfinished")
    with open(unfinished, "wb") as file:
        for first in range(0, n_tokens, _CHUNK_TOKENS):
            tokens = np.empty(min(_CHUNK_TOKENS, n_tokens - first), np.int64)
            stream.read(first, tokens)
            file.write(tokens.astype(dtype).tobytes())
    starts = stream.document_starts().astype(np.int64)
    head = MAGIC + struct.pack("<QBQQ", 1, code, starts.size, starts.size + 1)
    lengths = np.diff(starts, append=n_tokens).astype("<i4")
    parts = [lengths, (starts * dtype.itemsize).astype("<i8"), np.arange(starts.size + 1, dtype="<i8")]
    unfinished.replace(prefix.with_name(f"{prefix.name}.bin"))
    replace_file(prefix.with_name(f"{prefix.name}.idx"), head + b"".join(part.tobytes() for part in parts))
