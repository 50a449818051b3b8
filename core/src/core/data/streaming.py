"""Rows of a source that is too large to index: tokenised while training, in order, with a saved place."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from core.config.errors import UserError
from core.data.packing import Batch, pack_rows
from core.data.sampling import held_out
from core.data.sections import Section, batches, settled
from core.data.shards import TokenStream
from core.data.source import Source
from core.data.tokenizer import Tokenizer

RESERVED = 10_000
"""Validation text is held out of this many documents (sections, where they are long) at the head of a stream."""


def _reserved(number: int, fraction: float) -> bool:
    return 0 <= number < RESERVED and bool(held_out(number, 1, fraction)[0])


def reserved_documents(source: Source, tokenizer: Tokenizer, fraction: float) -> TokenStream:
    """What the training stream leaves out, in memory."""
    head = (
        _settled(number, section, lambda number: _reserved(number, fraction))
        for number, section in enumerate(islice(source.sections(), RESERVED))
        if _reserved(number, fraction)
    )
    encoded: list[np.ndarray] = []
    opens: list[bool] = []
    n_bytes = 0
    for sections in batches(head):
        encoded += [np.array(ids, dtype="<u4") for ids in tokenizer.encode_sections(sections)]
        opens += [section.opens for section in sections]
        n_bytes += sum(len(section.text.encode()) for section in sections)
    return TokenStream.hold(encoded, opens, n_bytes, tokenizer.vocab_size)


def _settled(number: int, section: Section, place: Callable[[int], Hashable]) -> Section:
    """A section as it stands where `place` sends its number and those of its neighbours."""
    return settled([section], [place(n) for n in (number - 1, number, number + 1)])[0]


class _Document(NamedTuple):
    """A document, or a section of one that goes on unless it `opens`."""

    epoch: int
    number: int
    tokens: np.ndarray
    opens: bool = True


class TextStream:
    """The training samples of one rank, which reads the documents whose number is `rank` modulo `n_ranks`.

    Sections of long documents count as documents. Samples overlap by one token, as windows of an indexed corpus do. The
    place is (samples read, epoch, document, tokens of that document already read); going back to it reads the earlier
    documents again without tokenising them.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, seq_len: int, fraction: float, *, rank: int, n_ranks: int
    ) -> None:
        assert 0 <= rank < n_ranks, (rank, n_ranks)
        self._source, self._tokenizer = source, tokenizer
        self._seq_len, self._fraction, self._rank, self._n_ranks = seq_len, fraction, rank, n_ranks
        self._go_to(position=0, epoch=0, document=0, offset=0)

    def read(self, first: int, count: int) -> Batch:
        """The next `count` samples; UserError unless `first` is the number of samples read so far."""
        if first != self._position:
            raise UserError(
                f"sample {first} was asked of a stream that stands at sample {self._position}: load the saved state of "
                "that place, or use dataloader.mode indexed, which reads any sample"
            )
        windows = np.empty((count, self._seq_len + 1), np.int64)
        starts = np.zeros(windows.shape, np.bool_)
        for row in range(count):
            self._take(windows[row], starts[row])
        return pack_rows(windows, starts)

    def state_dict(self) -> dict[str, int]:
        """The place: integers that JSON can hold."""
        head = self._queue[0] if self._queue else _Document(self._epoch, self._document, np.empty(0))
        return {
            "position": self._position,
            "epoch": head.epoch,
            "document": head.number,
            "offset": self._offset,
            "rank": self._rank,
            "n_ranks": self._n_ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a place; UserError when it is none, or another rank, or another number of ranks, saved it."""
        place = dict(state)
        if place.keys() != self.state_dict().keys() or not all(
            type(n) is int and 0 <= n < 2**62 for n in place.values()
        ):
            raise UserError(f"the saved state of the stream is none: {place}")
        rank, n_ranks = place.pop("rank"), place.pop("n_ranks")
        if (rank, n_ranks) != (self._rank, self._n_ranks):
            raise UserError(
                f"the place in the stream was saved by rank {rank} of {n_ranks}, this is rank {self._rank} of "
                f"{self._n_ranks}: go on with {n_ranks} data ranks, or use dataloader.mode indexed"
            )
        self._go_to(**place)

    def _go_to(self, *, position: int, epoch: int, document: int, offset: int) -> None:
        self._position, self._epoch, self._document, self._offset = position, epoch, document, offset
        self._queue: deque[_Document] = deque()
        self._documents = self._read_from(epoch, document)
        if epoch or document or offset:
            self._queue.append(self._document_at(epoch, document, offset))

    def _document_at(self, epoch: int, number: int, offset: int) -> _Document:
        """The first document from a saved place on."""
        document = next(self._documents)
        if (document.epoch, document.number) != (epoch, number) or offset >= document.tokens.size:
            raise UserError(
                f"{self._source.name} has no document {number:,} with {offset + 1:,} tokens for rank {self._rank}: the "
                "text has changed since the place was saved"
            )
        return document

    def _read_from(self, epoch: int, first: int) -> Iterator[_Document]:
        while True:
            empty = True
            for number, section in islice(enumerate(self._source.sections()), first, None):
                if self._place(number) == (self._rank, False):
                    section = _settled(number, section, self._place)
                    [tokens] = self._tokenizer.encode_sections([section])
                    empty &= not tokens
                    yield _Document(epoch, number, np.array(tokens, dtype=np.int64), section.opens)
            if empty and first == 0:
                rank = f"rank {self._rank} of {self._n_ranks}"
                raise UserError(f"{self._source.name} has no training text for {rank}: use fewer ranks")
            epoch, first = epoch + 1, 0

    def _place(self, number: int) -> tuple[int, bool]:
        """The rank that reads a document, and whether it is held out instead."""
        return number % self._n_ranks, _reserved(number, self._fraction)

    def _take(self, window: np.ndarray, starts: np.ndarray) -> None:
        """Fill one sample and move on by all its tokens but the last, which begins the next."""
        filled = 0
        for document in self._queued():
            offset = self._offset if filled == 0 else 0
            part = document.tokens[offset : offset + window.size - filled]
            window[filled : filled + part.size] = part
            starts[filled] |= offset == 0 and document.opens
            filled += part.size
            if filled == window.size:
                break
        rest = self._offset + self._seq_len
        while rest >= self._queue[0].tokens.size:
            rest -= self._queue.popleft().tokens.size
        self._offset = rest
        self._position += 1

    def _queued(self) -> Iterator[_Document]:
        """The documents from the place on, those in the queue and then new ones, which join it."""
        yield from tuple(self._queue)
        for document in self._documents:
            self._queue.append(document)
            yield document
