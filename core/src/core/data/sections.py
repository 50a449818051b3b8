"""Documents in sections of bounded length, which are read, tokenised and dealt out one by one: none is too long.

The sections of a document follow one another in the token stream with nothing between them: it stays one document.
Only where its neighbour goes elsewhere (is held out for validation, or is another rank's) a section begins or ends a
document of its own. Tokens at a cut may differ from those of the whole text, so cuts lie at blank lines if there are
any.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

ROW_CHARACTERS = 2**20
"""So long may a section of a text be that is known to be one document: a row, a file of the standard library."""
FILE_CHARACTERS = 2**17
"""So long may one of a text file be: that may hold a whole corpus, of which validation and every rank want a share."""
_BATCH_CHARACTERS = 2**20
_PART_CHARACTERS = 2**16
_Item = TypeVar("_Item")


class LeftOut(NamedTuple):
    """A document that becomes no tokens."""

    place: str
    reason: str
    unreadable: bool
    """Whether that is a mistake in the data, as a bad line is."""


class Section(NamedTuple):
    """A stretch of a document: the whole of it, unless that is long."""

    text: str
    opens: bool = True
    """Whether the document begins with it."""
    closes: bool = True
    """Whether the document ends with it."""

    @property
    def is_blank(self) -> bool:
        """Whether this is a whole document without a visible character."""
        return self.opens and self.closes and (not self.text or self.text.isspace())


def split_sections(parts: Iterable[str], limit: int) -> Iterator[Section]:
    """The document that the parts make up, in sections of at most `limit` characters."""
    held: list[str] = []
    length = 0
    opens = True
    for part in parts:
        held.append(part)
        length += len(part)
        while length > limit:
            text = "".join(held)
            end = _place_to_cut(text, limit)
            yield Section(text[:end], opens, closes=False)
            opens = False
            held, length = [text[end:]], length - end
    yield Section("".join(held), opens)


def cut_row(text: str, limit: int | None = None) -> Iterator[Section]:
    """A document that is in memory, in sections of at most `limit` characters; None is ROW_CHARACTERS."""
    starts = range(0, len(text), _PART_CHARACTERS)
    parts = (text[start : start + _PART_CHARACTERS] for start in starts)
    return split_sections(parts, ROW_CHARACTERS if limit is None else limit)


def _place_to_cut(text: str, limit: int) -> int:
    """After the last blank line in the second half of what is allowed, else after a line, else in front of spaces."""
    for mark in ("\n\n", "\n"):
        place = text.rfind(mark, limit // 2, limit)
        if place >= 0:
            return place + len(mark)
    place = text.rfind(" ", limit // 2, limit)
    return len(text[:place].rstrip(" ")) if place > 0 and text[:place].rstrip(" ") else limit


def settled(sections: Sequence[Section], places: Sequence[Hashable]) -> list[Section]:
    """The sections as they stand where they go: what goes on elsewhere ends, what comes from elsewhere begins.

    `places` has one entry per section, one for the section before them all, and one for that after them.
    """
    return [
        Section(section.text, section.opens or here != before, section.closes or here != after)
        for section, before, here, after in zip(sections, places, places[1:], places[2:], strict=False)
    ]


def batches(sections: Iterable[Section]) -> Iterator[list[Section]]:
    """The sections in lists of about a million characters, so that many cores may encode one."""
    return grouped(sections, lambda section: len(section.text))


def grouped(items: Iterable[_Item], characters: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """What stands for sections in lists of about a million characters."""
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
