"""The rows of a text: windows of its tokens, indexed in a cache, or streamed while training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from core.config.errors import UserError
from core.data.bins import PackedRows
from core.data.corpus import Corpus
from core.data.dataset import open_source
from core.data.packing import Batch, pack_rows
from core.data.samples import IndexedSamples, MaskKind, Samples
from core.data.shards import FORMAT, TokenStream, json_digest
from core.data.streaming import TextStream, reserved_documents


class IndexedText(IndexedSamples):
    """Windows of a text, any of them at any time; the text is tokenised once, into a cache."""

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedSamples.Config, Corpus.Config):
        packing: Literal["concatenate", "best_fit"] = "concatenate"
        """concatenate cuts rows out of one document behind the other; best_fit puts whole documents into rows, cuts
        only those that are longer than one, and fills rows up with padding, which does not count."""

        def mask(self) -> MaskKind:
            return "document" if self.packing == "best_fit" else "causal"

        def held_out(self) -> Self:
            return replace(super().held_out(), validation_fraction=0.0)

        def validation_problems(self) -> Iterator[tuple[str, str]]:
            if self.validation_fraction == 0:
                yield (
                    "validation_fraction",
                    "validation_fraction 0 holds nothing out for the validator: raise it, or --validator.no-enable",
                )

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        corpus = Corpus(self.config, tokenizer=self.tokenizer, verify=self.verify)
        self.description = corpus.describe(self.split)
        self.fingerprint = corpus.manifest.splits[self.split].sha256
        self._tokens = corpus.split(self.split)
        self._packed = PackedRows(self._tokens, self.seq_len) if self.config.packing == "best_fit" else None
        if self._packed is None:
            self.rows_per_epoch = n_windows(self._tokens, self)
        else:
            self.rows_per_epoch, self.filled = self._packed.n_rows, self._packed.filled
            self.description += f", {self._packed.padding:.1%} padding"

    def rows_at(self, numbers: np.ndarray) -> Batch:
        if self._packed is not None:
            return pack_rows(*self._packed.windows(numbers))
        return pack_rows(*self._tokens.windows(numbers, self.seq_len))


class StreamedText(Samples):
    """Windows of a text that is too large to keep, tokenised while training: in the order of its documents, of which
    each rank reads every `n_ranks`-th, without end. What is held out for validation is held in memory, and indexed."""

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedText.Config):
        shuffle: bool = False
        """False: a stream is read in the order of its documents."""

        def problems(self) -> Iterator[tuple[str, str]]:
            """What a stream cannot do."""
            yield from super().problems()
            if self.shuffle:
                yield "shuffle", "a stream is read in order: set shuffle to false, or mode to indexed"
            if self.packing != "concatenate":
                yield "packing", "a stream is cut into rows as it comes: best_fit needs mode indexed"
            if self.epochs is not None:
                yield "epochs", "a stream has no known length and repeats without end: set epochs to None"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        c = self.config
        source = open_source(c.dataset, c.text_field, c.on_bad_line, c.format, c.section_characters)
        self.fingerprint = json_digest([FORMAT, source.fingerprint(), self.tokenizer.fingerprint])
        self.in_order = self.split == "train"
        if self.in_order:
            place = {"rank": self.rank, "n_ranks": self.n_ranks}
            self._stream = TextStream(source, self.tokenizer, self.seq_len, c.validation_fraction, **place)
            self.description = f"{source.name}: streamed, rank {self.rank} of {self.n_ranks} (train)"
        else:
            self._held = reserved_documents(source, self.tokenizer, c.validation_fraction)
            documents = f"{self._held.extent.documents:,} documents"
            self.description = f"{source.name}: {documents} held in memory (validation)"
            self.n_rows = self.rows_per_epoch = n_windows(self._held, self)

    def rows(self, first: int, count: int) -> Batch:
        if self.in_order:
            return self._stream.read(first, count)
        return pack_rows(*self._held.windows(np.arange(first, first + count), self.seq_len))

    def state_dict(self) -> dict[str, int]:
        return self._stream.state_dict() if self.in_order else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.in_order and state:
            self._stream.load_state_dict(state)
        else:
            super().load_state_dict(state)


def n_windows(tokens: TokenStream, samples: Samples) -> int:
    """How many rows the tokens have. Raises `UserError` where there is none."""
    extent, seq_len, split = tokens.extent, samples.seq_len, samples.split
    if (n := (extent.tokens - 1) // seq_len) < 1:
        raise UserError(
            f"{samples.description}: the {split} split has {extent.tokens:,} tokens in {extent.documents:,} documents, "
            f"one sample needs {seq_len + 1:,}: add text, shorten the sequence"
            f"{', or raise validation_fraction' if split == 'validation' else ''}"
        )
    return n
