"""Data as somebody reads them outside of core."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from core.config.errors import UserError
from core.config.record import absolute
from core.data.bad_lines import BadLines, reading
from core.data.packing import IGNORE, Batch, pack_rows
from core.data.samples import IndexedSamples, Samples
from core.data.sections import Section, cut_row
from core.data.source import Source


class NpyRows(IndexedSamples):
    """Rows of tokens in .npy files, read where they lie; behind the last token of each stands its label."""

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedSamples.Config):
        path: str
        """The rows to train on, (rows, seq_len + 1) whole numbers."""
        validation_path: str
        """Rows that are held out."""

        def places(self) -> dict[str, Any]:
            return {"path": absolute(self.path), "validation_path": absolute(self.validation_path)}

    def open(self) -> None:
        path = self.config.path if self.split == "train" else self.config.validation_path
        try:
            self.array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        if self.array.dtype.kind not in "iu" or self.array.shape[1:] != (self.seq_len + 1,):
            found = f"{self.array.dtype} {self.array.shape}"
            raise UserError(f"{path} holds {found}, expected whole numbers (rows, {self.seq_len + 1})")
        self.rows_per_epoch = len(self.array)
        self.description = f"{path}: {self.rows_per_epoch:,} rows ({self.split})"
        self.fingerprint = hashlib.sha256(self.array).hexdigest()

    def rows_at(self, numbers: np.ndarray) -> Batch:
        return pack_rows(self.array[numbers], starts=np.zeros((len(numbers), self.seq_len + 1), np.bool_))


class Chapters(Source):
    """The chapters of a book, which is one file: each begins with a line that begins with `# `."""

    @dataclass(kw_only=True, slots=True)
    class Config(Source.Config):
        path: str
        """The file."""

        def places(self) -> dict[str, Any]:
            return {"path": absolute(self.path)}

    config: Config

    def open(self) -> None:
        self.name = self.config.path
        with reading(self.name):
            self.text = Path(self.name).read_text(encoding="utf-8")

    def fingerprint(self) -> list[Any]:
        return [hashlib.sha256(self.text.encode()).hexdigest()]

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        for chapter in re.split("^(?=# )", self.text, flags=re.MULTILINE):
            yield from cut_row(chapter)


class Sums(Samples):
    """Endless rows that nobody stored: sums of two numbers, of which the answer alone counts for the loss."""

    config: Samples.Config

    def open(self) -> None:
        self.description, self.fingerprint = "sums of two numbers", "sums"
        self.n_rows = 12 if self.split == "validation" else None

    def rows(self, first: int, count: int) -> Batch:
        made = [np.random.default_rng([self.seed, row]).integers(100, size=2) for row in range(first, first + count)]
        texts = [self.tokenizer.encode(f"{a} + {b} = {a + b}\n" * self.seq_len)[: self.seq_len + 1] for a, b in made]
        batch = pack_rows(np.array(texts), starts=np.zeros((count, self.seq_len + 1), np.bool_))
        batch.labels_BL[:, : self.seq_len // 2] = IGNORE
        return batch


class Counting(Samples):
    """A stream: each rank counts on from where it is, and all that its place is, is a number."""

    config: Samples.Config
    in_order = True

    def open(self) -> None:
        self.description, self.fingerprint, self.place = f"rank {self.rank} counts", "counting", 0

    def rows(self, first: int, count: int) -> Batch:
        assert first == self.place
        self.place += count
        numbers = np.arange(first, first + count)[:, None] + np.arange(self.seq_len + 1) + 1000 * self.rank
        return pack_rows(numbers % self.tokenizer.vocab_size, starts=np.zeros(numbers.shape, np.bool_))

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Faulty(IndexedSamples):
    """Does one thing wrong."""

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedSamples.Config):
        fault: str = ""

    config: Config

    def open(self) -> None:
        self.description, self.fingerprint, self.rows_per_epoch = "faulty", "", int(self.config.fault != "empty")

    def rows_at(self, numbers: np.ndarray) -> Batch:
        length = self.seq_len + (self.config.fault != "short")
        token = {"negative": -1, "large": self.tokenizer.vocab_size}.get(self.config.fault, 0)
        tokens = np.full((len(numbers), length), token)
        batch = pack_rows(tokens, np.zeros(tokens.shape, np.bool_))
        if self.config.fault == "labels":
            batch.labels_BL[0, 3] = self.tokenizer.vocab_size
        return batch.map(Tensor.float) if self.config.fault == "floats" else batch
