"""The rows of a run, whatever they are read from. docs/add-a-data-source.md makes a kind of one's own.

Letters: B rows, L tokens of a row (the sequence length).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
import torch

from core.config.configurable import Configurable, field_names
from core.config.errors import UserError
from core.data.packing import IGNORE, Batch
from core.data.sampling import Split, shuffled
from core.data.tokenizer import Tokenizer

MaskKind = Literal["causal", "document"]
"""What a token may look at: all before it in its row, or only those of its own document."""
OLD_MODES = {"indexed": "core.data.text:IndexedText", "streaming": "core.data.text:StreamedText"}
"""The classes that `mode` chose before there was a choice of classes."""


class Samples(Configurable, ABC):
    """The rows of one split of the data, `seq_len` tokens each, numbered from 0 over the whole run.

    Row i is a pure function of the settings, the seed and i, equal on every rank: resuming, sharing a step among ranks
    and changing their number is arithmetic on numbers, and there is no state. Where that cannot be had (`in_order`),
    each rank has rows of its own, which it reads one after another, and its place is a state to save.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        def validation_problems(self) -> Iterator[tuple[str, str]]:
            """What leaves a validator without rows: pairs as of `problems`, asked for where one is enabled."""
            yield from ()

        def mask(self) -> MaskKind:
            """What training.mask auto stands for."""
            return "causal"

        def inputs(self, n_rows: int, seq_len: int) -> dict[str, torch.Tensor]:
            """Zeros in the shape of what so many rows have beside their tokens (`Batch.inputs`), for a plan."""
            del n_rows, seq_len
            return {}

        def held_out(self) -> Self:
            """The same data as a set that is read for validation: all of it, once."""
            return self

        @classmethod
        def upgrade(cls, data: dict[str, Any], now: Configurable.Config | None = None) -> dict[str, Any]:
            """Text was all that there was, in one of two modes: data without a class is about that, unless they stand
            where one class alone may."""
            stated = "mode" in data and "mode" not in field_names(cls)
            if "class" in data or (not stated and (now is not None or cls is not Samples.Config)):
                return data
            mode = data.get("mode", "indexed") if stated else "indexed"
            if mode not in OLD_MODES:
                raise UserError(f"dataloader.mode: expected {' or '.join(OLD_MODES)}, got {mode}")
            return {"class": OLD_MODES[mode], **{name: value for name, value in data.items() if name != "mode"}}

    in_order: bool = False
    """Whether a rank has rows of its own, which are read one after another: `first` is how many it has read so far."""
    n_rows: int | None = None
    """Rows in the whole run; None where they never end."""
    rows_per_epoch: int | None = None
    """Rows in one pass over the data; None where that is not known, or where nothing is passed over."""
    parts_of_rows: Mapping[str, range] = MappingProxyType({})
    """Stretches of a validation split by name whose losses are also reported apart."""
    source_names: Sequence[str] = ()
    """What the rows are read from, where the record tells apart what that is."""
    description: str
    """One line for the head of a run: what is read, and how much of it."""
    fingerprint: str
    """Differs wherever the rows may; equal on all ranks and machines."""

    def __init__(
        self,
        config: Config,
        *,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        split: Split = "train",
        rank: int = 0,
        n_ranks: int = 1,
        rows_per_step: int = 1,
        verify: bool = True,
    ) -> None:
        """`rank` of `n_ranks` that read different rows, `rows_per_step` in a step together; `verify` is false on ranks
        that follow another one of their machine, which has compared what lies in a cache with what was written."""
        self.config, self.tokenizer, self.seq_len, self.seed, self.split = config, tokenizer, seq_len, seed, split
        self.rank, self.n_ranks, self.rows_per_step, self.verify = rank, n_ranks, rows_per_step, verify
        self.open()

    @abstractmethod
    def open(self) -> None:
        """State `description`, `fingerprint` and the lengths of `self.split`; called once, when this is built.

        Raises `UserError` for data that cannot be read. `self.config`, `tokenizer`, `seq_len`, `seed`, `split`, `rank`,
        `n_ranks`, `rows_per_step` and `verify` are there.
        """

    @abstractmethod
    def rows(self, first: int, count: int) -> Batch:
        """The rows first, ..., first + count - 1, all of them below `n_rows`."""

    def read(self, first: int, count: int) -> Batch:
        """The rows first, ..., first + count - 1, checked.

        Raises `IndexError` beyond `n_rows`, and `UserError` for ids that the tokenizer does not have.
        """
        if first < 0 or (self.n_rows is not None and first + count > self.n_rows):
            raise IndexError(f"rows {first} to {first + count - 1} of {self.n_rows}: the run ends before")
        batch = self.rows(first, count)
        for name, part_BL in zip(Batch._fields[:4], batch[:4], strict=True):
            if part_BL.shape != (count, self.seq_len) or part_BL.dtype != torch.int64:
                raise TypeError(
                    f"{type(self).__qualname__}.rows returned {name} of {tuple(part_BL.shape)} {part_BL.dtype}, "
                    f"expected {(count, self.seq_len)} torch.int64"
                )
        if short := [name for name, value in batch.inputs.items() if len(value) != count]:
            raise TypeError(f"{type(self).__qualname__}.rows returned {short[0]} of another number than {count} rows")
        if batch.tokens_BL.numel():
            labels_BL = batch.labels_BL.where(batch.labels_BL != IGNORE, 0)
            for ids_BL in (batch.tokens_BL, labels_BL):
                least, most = ids_BL.aminmax()
                self._check_ids(int(least), int(most), first, count)
        return batch

    def _check_ids(self, least: int, most: int, first: int, count: int) -> None:
        if least < 0 or most >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.description}: rows {first} to {first + count - 1} hold the id "
                f"{least if least < 0 else most:,}, and the tokenizer has {self.tokenizer.vocab_size:,}: give the "
                "tokenizer that made these tokens"
            )

    def sources(self, first: int, count: int) -> np.ndarray:
        """For each of the rows first, ..., first + count - 1 the place of its source in `source_names`, (count,)."""
        del first
        return np.zeros(count, np.int64)

    def tokens_before(self, n_rows: int) -> int:
        """Tokens in the first `n_rows` rows, without padding."""
        return n_rows * self.seq_len

    def tokens_by_source(self, n_rows: int) -> dict[str, int]:
        """Tokens in the first `n_rows` rows, without padding, by the names of what they are read from; nothing where
        that is one."""
        del n_rows
        return {}

    def epochs_by_source(self, n_rows: int) -> dict[str, float]:
        """Passes over each of those in the first `n_rows` rows, likewise."""
        del n_rows
        return {}

    def go_on(self, step: int, rows: int) -> None:
        """Stand where a run had read `rows` rows after `step`, in steps of another size than now; called once, before
        any row is read. Raises `UserError` where that cannot be."""
        del step, rows

    def state_dict(self) -> dict[str, int]:
        """The place of this rank where rows are read `in_order`: integers that JSON can hold; otherwise nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place. Raises `UserError` when it is one of another kind of data, or of other ranks."""
        if state or self.in_order:
            raise UserError("the place in the data was saved by another class of dataloader: go on with that one")


class IndexedSamples(Samples):
    """Rows of a finite set. An epoch has each of them once, in an order drawn anew or in their own; a validation split
    passes once, in their own.

    `open` states `rows_per_epoch`, too.
    """

    @dataclass(kw_only=True)
    class Config(Samples.Config):
        __slots__ = ()  # those of the fields come with the class that derives from it, which may have another parent
        shuffle: bool = True
        """Read the rows of the training split in an order drawn anew for every epoch."""
        epochs: int | None = None
        """Passes over the training split; None repeats it without end."""

        def problems(self) -> Iterator[tuple[str, str]]:
            """Empty runs."""
            yield from super().problems()
            if self.epochs is not None and self.epochs < 1:
                yield "epochs", f"must be at least 1, or None to repeat without end, not {self.epochs}"

        def held_out(self) -> Self:
            return replace(self, shuffle=False, epochs=1)

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples
    rows_per_epoch: int  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by `open`
    filled: np.ndarray | None = None
    """Tokens of each row as it lies in the data that are no padding, (rows_per_epoch,); None where there is no
    padding."""
    _counted: tuple[int, int] = (0, 0)
    """A number of rows, and the tokens in so many."""

    def __init__(self, config: Config, **live: Any) -> None:
        super().__init__(config, **live)
        if self.rows_per_epoch < 1:
            raise UserError(f"{self.description}: the {self.split} split has no row of {self.seq_len:,} tokens")
        passes = 1 if self.split == "validation" else config.epochs
        self.n_rows = None if passes is None else passes * self.rows_per_epoch

    @abstractmethod
    def rows_at(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers (int64, each below `rows_per_epoch`, in any order) as they lie in the data."""

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Where the rows first, ..., first + count - 1 lie in the data."""
        epochs, numbers = np.divmod(np.arange(first, first + count), self.rows_per_epoch)
        if self.config.shuffle and self.split == "train":
            for epoch in np.unique(epochs).tolist():
                inside = epochs == epoch
                numbers[inside] = shuffled(numbers[inside], self.rows_per_epoch, seed=self.seed, epoch=epoch)
        return numbers

    def rows(self, first: int, count: int) -> Batch:
        return self.rows_at(self.numbers(first, count))

    def tokens_before(self, n_rows: int) -> int:
        if self.filled is None:
            return super().tokens_before(n_rows)
        first, tokens = self._counted
        epochs = n_rows // self.rows_per_epoch
        if not epochs * self.rows_per_epoch <= first <= n_rows:
            first, tokens = epochs * self.rows_per_epoch, epochs * int(self.filled.sum())
        tokens += int(self.filled[self.numbers(first, n_rows - first)].sum())
        self._counted = n_rows, tokens
        return tokens
