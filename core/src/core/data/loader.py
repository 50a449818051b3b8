"""Training samples: of an indexed corpus by number, any of them at any time; of a stream in order, with saved state."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.data.corpus import Corpus, Split
from core.data.packing import Batch, pack
from core.data.sampling import shuffled
from core.data.shards import FORMAT, TokenStream, digest
from core.data.source import open_source
from core.data.streaming import StreamedSamples, reserved_documents
from core.data.tokenizer import Tokenizer


class DataLoader(Configurable):
    """Gives the samples of one split, `seq_len` tokens each, numbered over all epochs.

    In indexed mode sample i is a pure function of (seed, i) over the windows of the token stream, equal on every rank:
    resuming, sharing a step among ranks and changing their number is arithmetic on numbers. In streaming mode the
    training samples come in the order of the documents, of which each rank reads every `n_ranks`-th, and the position
    is a state to save. The validation split is never shuffled, passes once, and is indexed in both modes.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Corpus.Config):
        mode: Literal["indexed", "streaming"] = "indexed"
        """indexed tokenises once into a cache; streaming tokenises while training, for sets too large to keep."""
        shuffle: bool = True
        """Read the windows of the training split in an order drawn anew for every epoch."""
        epochs: int | None = None
        """Passes over the training split; None repeats it without end."""

        def problems(self) -> Iterator[tuple[str, str]]:
            """Settings that a stream cannot follow, and empty runs."""
            yield from super().problems()
            if self.epochs is not None and self.epochs < 1:
                yield "epochs", f"must be at least 1, or None to repeat without end, not {self.epochs}"
            if self.mode == "streaming" and self.shuffle:
                yield "shuffle", "a stream is read in order: set shuffle to false, or mode to indexed"
            if self.mode == "streaming" and self.epochs is not None:
                yield "epochs", "a stream has no known length and repeats without end: set epochs to None"

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
        verify: bool = True,
    ) -> None:
        """`verify` is false on ranks that follow another one of their machine, which has verified the cache."""
        self.n_samples: int | None = None
        """Samples in the whole run; None where they never end."""
        self.windows_per_epoch: int | None = None
        """Samples in one pass; None for a stream, whose length is not known."""
        self.fingerprint: str
        """Changes when the text or the tokenizer does."""
        self._stream: StreamedSamples | None = None
        self._seq_len, self._seed, self._shuffle = seq_len, seed, config.shuffle and split == "train"
        if config.mode == "indexed":
            corpus = Corpus(config, tokenizer=tokenizer, verify=verify)
            self.description, self.fingerprint = corpus.describe(split), corpus.manifest.splits[split].sha256
            self._index(corpus.split(split), split, config.epochs)
            return
        source = open_source(config.dataset, config.text_field, config.on_bad_line)
        self.fingerprint = digest([FORMAT, source.fingerprint(), tokenizer.fingerprint])
        if split == "validation":
            held = reserved_documents(source, tokenizer, config.validation_fraction)
            self.description = f"{source.name}: {held.extent.documents:,} documents held in memory (validation)"
            self._index(held, split, epochs=None)
        else:
            fraction = config.validation_fraction
            self._stream = StreamedSamples(source, tokenizer, seq_len, fraction, rank=rank, n_ranks=n_ranks)
            self.description = f"{source.name}: streamed, rank {rank} of {n_ranks} ({split})"

    def _index(self, tokens: TokenStream, split: Split, epochs: int | None) -> None:
        self._tokens = tokens
        self.windows_per_epoch = (tokens.extent.tokens - 1) // self._seq_len
        if self.windows_per_epoch < 1:
            raise UserError(
                f"{self.description}: the {split} split has {tokens.extent.tokens:,} tokens in "
                f"{tokens.extent.documents:,} documents, one sample needs {self._seq_len + 1:,}: add text, shorten the "
                f"sequence{', or raise validation_fraction' if split == 'validation' else ''}"
            )
        passes = 1 if split == "validation" else epochs
        self.n_samples = None if passes is None else passes * self.windows_per_epoch

    def read(self, first: int, count: int) -> Batch:
        """The samples first, ..., first + count - 1.

        Indexed, this depends on nothing but the arguments; beyond `n_samples` it is an IndexError. Of a stream,
        `first` must be the number of samples this rank has read so far.
        """
        if self._stream is not None:
            return self._stream.read(first, count)
        if first < 0 or (self.n_samples is not None and first + count > self.n_samples):
            raise IndexError(f"samples {first} to {first + count - 1} of {self.n_samples}: the run ends before")
        assert self.windows_per_epoch is not None
        numbers = np.arange(first, first + count)
        epochs, windows = np.divmod(numbers, self.windows_per_epoch)
        if self._shuffle:
            for epoch in np.unique(epochs).tolist():
                inside = epochs == epoch
                windows[inside] = shuffled(windows[inside], self.windows_per_epoch, seed=self._seed, epoch=epoch)
        return pack(*self._tokens.windows(windows, self._seq_len))

    def state_dict(self) -> dict[str, int]:
        """What must be saved to go on from here: of a stream its place; indexed nothing, for a number says all."""
        return {} if self._stream is None else self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; UserError when it was saved in the other mode, or by another number of ranks."""
        if bool(state) != (self._stream is not None):
            raise UserError("the place in the data was saved in the other dataloader.mode: go on in that mode")
        if self._stream is not None:
            self._stream.load_state_dict(state)
