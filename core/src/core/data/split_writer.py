"""Token streams written into the flat files of a prepared corpus (`core.data.shards`), hashed on the way."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from core.data.shards import STARTS, Extent, TokenStream, shard_name, token_type

_CHUNK_BYTES = 2**24


class SplitWriter:
    """Writes one split: files of bounded size, so that a corpus of any size is written in bounded memory."""

    def __init__(
        self, folder: Path, split: str, vocab_size: int, shard_tokens: int, kept: dict[str, Any] | None = None
    ) -> None:
        """`kept` is what `flush` returned: behind that the writing continues, and what was written later goes."""
        self.extent = Extent(**kept["extent"]) if kept else Extent()
        self.files: dict[str, str] = {}
        """SHA-256 of every file that is complete."""
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = token_type(vocab_size)
        self._writes: list[tuple[int, int]] = [(n, m) for n, m in kept["writes"]] if kept else []
        self._starts = HashedFile(folder / f"{split}.starts", self.extent.documents * STARTS.itemsize)
        self._shard: HashedFile | None = None
        for number, first in enumerate(range(0, self.extent.tokens, shard_tokens)):
            self._next_shard(number, min(shard_tokens, self.extent.tokens - first))
        self._hash = self._hash_of_kept()

    def _hash_of_kept(self) -> Any:
        """The hash of what was written before, piece by piece as it was written."""
        hashed, folder = hashlib.sha256(), self._folder
        extent = Extent(documents=self.extent.documents, tokens=self.extent.tokens)
        starts = np.memmap(folder / f"{self._split}.starts", STARTS, "r") if extent.documents else np.empty(0, STARTS)
        n_shards = -(-extent.tokens // self._shard_tokens)
        shards = [np.memmap(folder / shard_name(self._split, n), self._dtype, "r") for n in range(n_shards)]
        stream = TokenStream(shards, starts, extent, vocab_size=2 ** (8 * self._dtype.itemsize))
        document = token = 0
        for n_documents, n_tokens in self._writes:
            hashed.update(starts[document : document + n_documents].tobytes())
            tokens = np.empty(n_tokens, np.int64)
            stream.read(token, tokens)
            hashed.update(tokens.astype(self._dtype).tobytes())
            document, token = document + n_documents, token + n_tokens
        return hashed

    def write(self, sections: Sequence[Sequence[int] | np.ndarray], opens: Sequence[bool], n_bytes: int) -> None:
        """Append sections of documents, each opening one or going on, whose text has `n_bytes` in UTF-8."""
        lengths = np.array([len(ids) for ids in sections], dtype=STARTS)
        starts = self.extent.tokens + np.cumsum(lengths) - lengths
        opening = starts[np.array(opens, np.bool_)].astype(STARTS).tobytes()
        self._starts.write(opening)
        self._hash.update(opening)
        empty = np.empty(0, self._dtype)
        tokens = np.concatenate([empty, *(np.asarray(ids, self._dtype) for ids in sections)])
        self._writes.append((sum(opens), tokens.size))
        while tokens.size:
            filled = self.extent.tokens % self._shard_tokens
            if filled == 0:
                self._next_shard(self.extent.tokens // self._shard_tokens, 0)
            part, tokens = tokens[: self._shard_tokens - filled], tokens[self._shard_tokens - filled :]
            assert self._shard is not None
            self._shard.write(part.tobytes())
            self._hash.update(part.tobytes())
            self.extent.tokens += part.size
        self.extent.documents += sum(opens)
        self.extent.sections += len(sections)
        self.extent.bytes += n_bytes

    def _next_shard(self, number: int, kept_tokens: int) -> None:
        if self._shard is not None:
            self._finish(self._shard)
        name = shard_name(self._split, number)
        self._shard = HashedFile(self._folder / name, kept_tokens * self._dtype.itemsize)

    def _finish(self, file: "HashedFile") -> None:
        self.files[file.name] = file.finish()

    def flush(self) -> dict[str, Any]:
        """Bring what was written to the disk; returns what a writer needs to continue there."""
        self._starts.flush()
        if self._shard is not None:
            self._shard.flush()
        return {"extent": asdict(self.extent), "writes": self._writes}

    def close(self) -> None:
        """Bring everything to the disk."""
        self.extent.sha256 = self._hash.hexdigest()
        self._finish(self._starts)
        if self._shard is not None:
            self._finish(self._shard)


class HashedFile:
    """A file that is written once, and hashed on the way; `kept` bytes of it are there already."""

    def __init__(self, path: Path, kept: int = 0) -> None:
        self.name = path.name
        self._file: IO[bytes] = open(path, "r+b" if kept else "wb")
        self._hash = hashlib.sha256()
        self._file.truncate(kept) if kept else None
        while kept and (chunk := self._file.read(_CHUNK_BYTES)):
            self._hash.update(chunk)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> str:
        """Bring the file to the disk and close it; returns the SHA-256 of its bytes."""
        with self._file:
            self.flush()
        return self._hash.hexdigest()
