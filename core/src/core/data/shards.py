"""Token streams in flat, memory-mapped files: the folder of a prepared corpus, written once and read at random.

For each split s the folder holds s-00000.tokens, s-00001.tokens, ... (unsigned 16- or 32-bit ids, every file but the
last SHARD_TOKENS long) and s.starts (64-bit: the place in the stream where each document begins); manifest.json,
written last, says how much there must be. A document may lie across two files. All numbers are little-endian.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT = 2
SHARD_TOKENS = 2**28
MANIFEST = "manifest.json"
_STARTS = np.dtype("<i8")


@dataclass(kw_only=True, slots=True)
class Extent:
    """How much a split holds: documents, tokens, and bytes of text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    sha256: str = field(default="", compare=False)
    """Hash of the tokens and of the places where documents begin; empty for what was not written."""


class SplitWriter:
    """Writes one split: files of bounded size, so that a corpus of any size is written in bounded memory."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int) -> None:
        self.extent = Extent()
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = _token_type(vocab_size)
        self._starts: IO[bytes] = open(folder / f"{split}.starts", "wb")
        self._shard: IO[bytes] | None = None
        self._hash = hashlib.sha256()

    def write(self, documents: Sequence[list[int]], n_bytes: int) -> None:
        """Append documents, whose text has `n_bytes` in UTF-8."""
        lengths = np.array([len(ids) for ids in documents], dtype=_STARTS)
        starts = (self.extent.tokens + np.cumsum(lengths) - lengths).astype(_STARTS).tobytes()
        self._starts.write(starts)
        self._hash.update(starts)
        tokens = np.fromiter(chain.from_iterable(documents), self._dtype, count=int(lengths.sum()))
        while tokens.size:
            filled = self.extent.tokens % self._shard_tokens
            if filled == 0:
                self._next_shard()
            part, tokens = tokens[: self._shard_tokens - filled], tokens[self._shard_tokens - filled :]
            assert self._shard is not None
            self._shard.write(part.tobytes())
            self._hash.update(part.tobytes())
            self.extent.tokens += part.size
        self.extent.documents += len(documents)
        self.extent.bytes += n_bytes

    def _next_shard(self) -> None:
        if self._shard is not None:
            _close(self._shard)
        number = self.extent.tokens // self._shard_tokens
        self._shard = open(self._folder / _shard_name(self._split, number), "wb")

    def close(self) -> None:
        """Bring everything to the disk."""
        self.extent.sha256 = self._hash.hexdigest()
        for file in (self._starts, self._shard):
            if file is not None:
                _close(file)


def _close(file: IO[bytes]) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.tokens"


def _token_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a folder holds and what it was made from; `read_manifest` finds whether that is true."""

    made_from: dict[str, Any]
    vocab_size: int
    splits: dict[str, Extent]
    shard_tokens: int

    def write(self, folder: Path) -> None:
        """Complete the folder: the last file to be written."""
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)

    def sizes(self) -> dict[str, int]:
        """The size in bytes that each file must have."""
        sizes, item = {}, _token_type(self.vocab_size).itemsize
        for split, extent in self.splits.items():
            sizes[f"{split}.starts"] = extent.documents * _STARTS.itemsize
            for number, first in enumerate(range(0, extent.tokens, self.shard_tokens)):
                sizes[_shard_name(split, number)] = min(self.shard_tokens, extent.tokens - first) * item
        return sizes


class DamagedError(Exception):
    """A folder is no complete prepared corpus."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete folder; DamagedError where it, or a file that it lists, is not as it must be."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        content["splits"] = {split: Extent(**extent) for split, extent in content["splits"].items()}
        manifest = Manifest(**content)
        found = {name: (folder / name).stat().st_size for name in manifest.sizes()}
    except OSError as error:
        raise DamagedError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error!r}") from error
    for name, size in manifest.sizes().items():
        if found[name] != size:
            raise DamagedError(f"{name} has {found[name]:,} bytes instead of {size:,}")
    return manifest


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TokenStream:
    """One split as a single stream of tokens, in memory or mapped from files, and where documents start in it."""

    def __init__(self, shards: Sequence[np.ndarray], starts: np.ndarray, extent: Extent) -> None:
        self.extent = extent
        self._shards, self._starts = shards, starts
        self._shard_tokens = shards[0].size if shards else 0

    @classmethod
    def map(cls, folder: Path, manifest: Manifest, split: str) -> "TokenStream":
        """The split of a prepared corpus; its files are read when windows are."""
        extent, dtype = manifest.splits[split], _token_type(manifest.vocab_size)
        n_shards = -(-extent.tokens // manifest.shard_tokens)
        shards = [np.memmap(folder / _shard_name(split, number), dtype, "r") for number in range(n_shards)]
        starts = np.memmap(folder / f"{split}.starts", _STARTS, "r") if extent.documents else np.empty(0, _STARTS)
        return cls(shards, starts, extent)

    @classmethod
    def hold(cls, documents: Sequence[list[int]], n_bytes: int) -> "TokenStream":
        """A stream of the documents, held in memory."""
        lengths = np.array([len(ids) for ids in documents], dtype=_STARTS)
        extent = Extent(documents=len(documents), tokens=int(lengths.sum()), bytes=n_bytes)
        tokens = np.fromiter(chain.from_iterable(documents), np.dtype("<u4"), count=extent.tokens)
        return cls([tokens] if extent.tokens else [], np.cumsum(lengths) - lengths, extent)

    def windows(self, numbers: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts (bool) of windows, both of shape (len(numbers), seq_len + 1).

        Window w covers the tokens from w * seq_len to (w + 1) * seq_len, both included: neighbours share one token, so
        that every token but the first is the label of exactly one.
        """
        firsts = numbers.astype(np.int64) * seq_len
        assert all(0 <= first < self.extent.tokens - seq_len for first in firsts.tolist())
        tokens = np.empty((len(numbers), seq_len + 1), np.int64)
        opens = np.zeros(tokens.shape, np.bool_)
        lows = np.searchsorted(self._starts, firsts)
        highs = np.searchsorted(self._starts, firsts + seq_len, side="right")
        for row, first in enumerate(firsts.tolist()):
            self._copy(first, tokens[row])
            opens[row, self._starts[lows[row] : highs[row]] - first] = True
        return tokens, opens

    def _copy(self, first: int, target: np.ndarray) -> None:
        filled = 0
        while filled < target.size:
            shard, place = divmod(first + filled, self._shard_tokens)
            part = self._shards[shard][place : place + target.size - filled]
            target[filled : filled + part.size] = part
            filled += part.size
