"""Token streams in flat, memory-mapped files: the folder of a prepared corpus, written once and read at random.

For each split s the folder holds s-00000.tokens, s-00001.tokens, ... (unsigned 16- or 32-bit ids, every file but the
last SHARD_TOKENS long) and s.starts (64-bit: the place in the stream where each document begins); manifest.json,
written last, says how much there must be, with the hash of every file and of itself; core.data.integrity compares. A
document may lie across two files. All numbers are little-endian.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.config.errors import UserError
from core.config.json_file import read_json
from core.runtime.disk import flush

FORMAT = 4
"""Another one whenever the same text becomes other tokens or other files."""
SHARD_TOKENS = 2**28
TOKEN_MANIFEST = "manifest.json"
VERIFIED = "verified.json"
"""Remembers which files were verified; see core.data.integrity."""
STARTS = np.dtype("<i8")
MAX_TOKENS = 2**60
"""More than any disk holds, so that sums of two counts stay below 2**63."""


@dataclass(kw_only=True, slots=True)
class Extent:
    """How much a split holds: documents, tokens, and bytes of text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    sections: int = 0
    """More than documents where some are long: see core.data.sections."""
    sha256: str = field(default="", compare=False)
    """Hash of the tokens and of the places where documents begin, whatever files hold them; empty for what was not
    written."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.tokens"


def token_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(kw_only=True, slots=True)
class TokenManifest:
    """What a folder holds and what it was made from; `core.data.integrity` finds whether that is true."""

    made_from: dict[str, Any]
    vocab_size: int
    splits: dict[str, Extent]
    shard_tokens: int
    files: dict[str, str]
    """SHA-256 of every file."""

    def write(self, folder: Path) -> None:
        """Complete the folder: the last file to be written."""
        content = asdict(self)
        with open(folder / TOKEN_MANIFEST, "w", encoding="utf-8") as file:
            json.dump({**content, "digest": json_digest(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        flush(folder)

    def sizes(self) -> dict[str, int]:
        """The size in bytes that each file must have."""
        sizes, item = {}, token_type(self.vocab_size).itemsize
        for split, extent in self.splits.items():
            sizes[f"{split}.starts"] = extent.documents * STARTS.itemsize
            for number, first in enumerate(range(0, extent.tokens, self.shard_tokens)):
                sizes[shard_name(split, number)] = min(self.shard_tokens, extent.tokens - first) * item
        return sizes


class DamagedError(Exception):
    """A folder is no complete prepared corpus."""


def read_token_manifest(folder: Path) -> TokenManifest:
    """The manifest of a folder; DamagedError where it cannot be read or contradicts itself."""
    try:
        content = read_json(folder / TOKEN_MANIFEST)
        if content.pop("digest", None) != json_digest(content):
            raise DamagedError(f"{TOKEN_MANIFEST} was changed after it was written")
        content["splits"] = {split: Extent(**extent) for split, extent in content["splits"].items()}
        manifest = TokenManifest(**content)
        _check_counts(manifest)
        n_shards = sum(-(-extent.tokens // manifest.shard_tokens) for extent in manifest.splits.values())
        if len(manifest.files) != n_shards + len(manifest.splits) or manifest.files.keys() != manifest.sizes().keys():
            raise ValueError("the files it lists are not those of its counts")
    except UserError as error:
        raise DamagedError(str(error)) from error.__cause__ or error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{TOKEN_MANIFEST} cannot be read: {error!r}") from error
    return manifest


def _check_counts(manifest: TokenManifest) -> None:
    counts = [manifest.vocab_size, manifest.shard_tokens]
    for extent in manifest.splits.values():
        counts += [extent.documents, extent.tokens, extent.bytes, extent.sections]
    if not all(type(count) is int and 0 <= count <= MAX_TOKENS for count in counts) or manifest.shard_tokens == 0:
        raise ValueError(f"counts {counts}")
    if not all(isinstance(extent.sha256, str) for extent in manifest.splits.values()):
        raise ValueError("a hash that is no text")


def json_digest(data: Any) -> str:
    """The hash of data that JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class TokenStream:
    """One split as a single stream of tokens, in memory or mapped from files, and where documents start in it."""

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        starts: np.ndarray,
        extent: Extent,
        *,
        vocab_size: int,
        folder: Path | None = None,
    ) -> None:
        self.extent = extent
        self._shards, self._starts = shards, starts
        self._shard_tokens = shards[0].size if shards else 0
        self._vocab_size, self._folder = vocab_size, folder

    @classmethod
    def map(cls, folder: Path, manifest: TokenManifest, split: str) -> "TokenStream":
        """The split of a prepared corpus; its files are read when windows are."""
        extent, dtype = manifest.splits[split], token_type(manifest.vocab_size)
        n_shards = -(-extent.tokens // manifest.shard_tokens)
        shards = [np.memmap(folder / shard_name(split, number), dtype, "r") for number in range(n_shards)]
        starts = np.memmap(folder / f"{split}.starts", STARTS, "r") if extent.documents else np.empty(0, STARTS)
        return cls(shards, starts, extent, vocab_size=manifest.vocab_size, folder=folder)

    @classmethod
    def hold(
        cls, sections: Sequence[Sequence[int] | np.ndarray], opens: Sequence[bool], n_bytes: int, vocab_size: int
    ) -> "TokenStream":
        """A stream of sections of documents, held in memory."""
        lengths = np.array([len(ids) for ids in sections], dtype=STARTS)
        starts = (np.cumsum(lengths) - lengths)[np.array(opens, np.bool_)]
        extent = Extent(documents=starts.size, tokens=int(lengths.sum()), bytes=n_bytes, sections=len(sections))
        shards = [np.concatenate([np.asarray(ids, "<u4") for ids in sections])] if extent.tokens else []
        return cls(shards, starts, extent, vocab_size=vocab_size)

    def document_starts(self) -> np.ndarray:
        """Where documents begin, in ascending order, (documents,)."""
        return np.asarray(self._starts)

    def read(self, first: int, target: np.ndarray) -> None:
        """Fill `target`, of shape (n,), with the tokens from `first` on. Raises `UserError` as `windows` does."""
        self._copy(first, target)
        self._check_ids(target)

    def windows(self, numbers: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document starts (bool) of windows, both of shape (len(numbers), seq_len + 1).

        Window w covers the tokens from w * seq_len to (w + 1) * seq_len, both included: neighbours share one token, so
        that every token but the first is the label of exactly one. Raises UserError where files have changed under the
        run, to ids beyond the vocabulary or to starts that do not ascend.
        """
        firsts = numbers.astype(np.int64) * seq_len
        assert all(0 <= first < self.extent.tokens - seq_len for first in firsts.tolist())
        tokens = np.empty((len(numbers), seq_len + 1), np.int64)
        opens = np.zeros(tokens.shape, np.bool_)
        lows = np.searchsorted(self._starts, firsts)
        highs = np.searchsorted(self._starts, firsts + seq_len, side="right")
        for row, first in enumerate(firsts.tolist()):
            self._copy(first, tokens[row])
            places = self._starts[lows[row] : highs[row]] - first
            if places.size and (places[0] < 0 or places[-1] > seq_len or (places[1:] < places[:-1]).any()):
                raise self._changed(f"document starts that do not ascend, in tokens {first:,} to {first + seq_len:,}")
            opens[row, places] = True
        self._check_ids(tokens)
        return tokens, opens

    def _check_ids(self, tokens: np.ndarray) -> None:
        if tokens.size and (largest := int(tokens.max())) >= self._vocab_size:
            raise self._changed(f"the id {largest:,} in a vocabulary of {self._vocab_size:,}")

    def _changed(self, found: str) -> UserError:
        """What is said of files that have changed since they were verified; the next start verifies them again."""
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / VERIFIED).unlink()
        return UserError(
            f"the prepared corpus {self._folder} has changed since it was verified: it holds {found}. Start "
            "the run again: the corpus is then prepared again"
        )

    def _copy(self, first: int, target: np.ndarray) -> None:
        filled = 0
        while filled < target.size:
            shard, place = divmod(first + filled, self._shard_tokens)
            part = self._shards[shard][place : place + target.size - filled]
            target[filled : filled + part.size] = part
            filled += part.size
