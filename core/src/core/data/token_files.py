"""Tokens that other programs wrote, read where they lie: Megatron's .bin and .idx, llm.c's and nanoGPT's .bin, .npy.

A file says itself what it is: one with an .idx beside it is Megatron's; one that begins with llm.c's or NumPy's header
is of those; all else is plain ids without a header, as of nanoGPT and OLMo-core.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from core.config.errors import UserError
from core.config.record import absolute
from core.data.bad_lines import reading
from core.data.megatron import read_megatron
from core.data.packing import Batch, pack_rows
from core.data.samples import IndexedSamples
from core.data.shards import token_type

SUFFIXES = (".bin", ".npy")
LLM_C_TYPES = {20240520: "<u2", 20240801: "<u4"}
"""By the first number of a header of 256: that of GPT-2's ids, and that of Llama 3's."""
_NUMPY = b"\x93NUMPY"
_STRETCHES, _STRETCH_TOKENS = 256, 2**16


class Tokens(NamedTuple):
    """A file of ids, mapped into memory, and where documents begin in it; None where the file does not say."""

    ids: np.ndarray
    starts: np.ndarray | None = None


class TokenFiles(IndexedSamples):
    """Windows of tokens that another program wrote, one file behind the other; each file begins a document.

    Documents begin where Megatron's index says so, and in other files behind the tokenizer's end token. The fingerprint
    is of the sizes and of 256 stretches of 65,536 tokens of each file, of small ones so of all.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedSamples.Config):
        path: str
        """A file (.bin, .npy), Megatron's without its ending, a folder or a glob pattern: what training reads."""
        validation_path: str | None = None
        """The same of what validation reads."""
        dtype: Literal["auto", "uint16", "uint32", "int32", "int64"] = "auto"
        """Type of ids in files without a header; auto is uint16 where that holds the tokenizer's ids, else uint32."""

        def places(self) -> dict[str, Any]:
            return {"path": absolute(self.path), "validation_path": absolute(self.validation_path)}

        def validation_problems(self) -> Iterator[tuple[str, str]]:
            if self.validation_path is None:
                yield "validation_path", "names no tokens for the validator: give a file, or --validator.no-enable"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        path = self.config.path if self.split == "train" else self.config.validation_path
        if path is None:
            raise UserError("dataloader.validation_path names no tokens for validation")
        plain = token_type(self.tokenizer.vocab_size) if self.config.dtype == "auto" else np.dtype(self.config.dtype)
        files = find_token_files(path)
        self._tokens = [open_tokens(file, plain) for file in files]
        self._firsts = np.cumsum([0, *(tokens.ids.size for tokens in self._tokens)])
        n_tokens = int(self._firsts[-1])
        self.description = f"{path}: {n_tokens:,} tokens in {len(files):,} files ({self.split})"
        if n_tokens <= self.seq_len:
            raise UserError(f"{self.description}: one row needs {self.seq_len + 1:,}: shorten the sequence")
        self.rows_per_epoch = (n_tokens - 1) // self.seq_len
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        hashed = hashlib.sha256()
        for ids, starts in self._tokens:
            hashed.update(f"{ids.dtype.str} {ids.size} {None if starts is None else starts.size} ".encode())
            for first in np.unique(np.linspace(0, max(0, ids.size - _STRETCH_TOKENS), _STRETCHES, dtype=np.int64)):
                hashed.update(ids[first : first + _STRETCH_TOKENS].tobytes())
            if starts is not None:
                hashed.update(starts.tobytes())
        return hashed.hexdigest()

    def rows_at(self, numbers: np.ndarray) -> Batch:
        windows = np.empty((len(numbers), self.seq_len + 1), np.int64)
        opens = np.zeros(windows.shape, np.bool_)
        for row, number in enumerate(numbers.tolist()):
            self._read(number * self.seq_len, windows[row], opens[row])
        return pack_rows(windows, opens)

    def _read(self, first: int, window: np.ndarray, opens: np.ndarray) -> None:
        """Fill a window with the tokens from `first` on, and mark those that open a document."""
        filled = 0
        while filled < window.size:
            file = int(np.searchsorted(self._firsts, first + filled, side="right")) - 1
            place = first + filled - int(self._firsts[file])
            ids, starts = self._tokens[file]
            part = ids[place : place + window.size - filled]
            window[filled : filled + part.size] = part
            here = opens[filled : filled + part.size]
            if starts is not None:
                low, high = np.searchsorted(starts, (place, place + part.size))
                here[starts[low:high] - place] = True
            elif self.tokenizer.eos_id is not None:
                here[1:] = part[:-1] == self.tokenizer.eos_id
                here[0] |= place > 0 and ids[place - 1] == self.tokenizer.eos_id
            here[0] |= place == 0
            filled += part.size


def find_token_files(path: str) -> list[Path]:
    """The files that a path, a path without its ending, a folder or a glob pattern stands for, in order."""
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        inside = sorted(each for each in place.rglob("*") if each.is_file() and not each.name.startswith("."))
        others = [each for each in inside if each.suffix not in (*SUFFIXES, ".idx")]
        files = [each for each in inside if each.suffix in SUFFIXES]
        if others:
            raise UserError(f"the folder {place} holds {others[0].name}, which is no file of tokens: name a pattern")
    elif place.is_file():
        files = [place.with_suffix(".bin") if place.suffix == ".idx" else place]
    elif glob.has_magic(path):
        files = [each for each in map(Path, sorted(glob.glob(str(place), recursive=True))) if each.suffix != ".idx"]
    else:
        files = [each for each in [place.with_name(f"{place.name}.bin")] if each.is_file()]
    if not files:
        raise UserError(f"there are no tokens in {place}: name a .bin or .npy file, a folder with such or a pattern")
    if wrong := [each for each in files if each.suffix not in SUFFIXES]:
        raise UserError(f"cannot tell what {wrong[0]} holds: its name must end in {', '.join(SUFFIXES)}")
    return files


def open_tokens(path: Path, plain: np.dtype[Any]) -> Tokens:
    """The ids in a file. Raises UserError for one whose size does not fit what its header or index says."""
    index = path.with_suffix(".idx")
    with reading(path):
        n_bytes = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(1024)
    if path.suffix == ".bin" and index.exists():
        dtype, n_tokens, starts = read_megatron(index, path, n_bytes)
        return Tokens(_mapped(path, dtype, 0, n_tokens), starts)
    if head.startswith(_NUMPY):
        return _of_numpy(path)
    magic = int.from_bytes(head[:4], "little")
    if magic in LLM_C_TYPES and len(head) == 1024:
        stated, dtype = int.from_bytes(head[8:12], "little"), np.dtype(LLM_C_TYPES[magic])
        if n_bytes != 1024 + stated * dtype.itemsize:
            raise UserError(f"{path} has {n_bytes:,} bytes, and its header says {stated:,} ids of {dtype}")
        return Tokens(_mapped(path, dtype, 1024, stated))
    if n_bytes % plain.itemsize:
        raise UserError(f"{path} has {n_bytes:,} bytes, which is no number of {plain} ids: set dataloader.dtype")
    return Tokens(_mapped(path, plain, 0, n_bytes // plain.itemsize))


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, size: int) -> np.ndarray:
    with reading(path):
        return np.memmap(path, dtype, "r", offset, (size,)) if size else np.empty(0, dtype)


def _of_numpy(path: Path) -> Tokens:
    try:
        ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{path} holds {ids.dtype} {ids.shape}, expected whole numbers in one dimension")
    return Tokens(ids)
