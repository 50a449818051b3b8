"""What the documents of a source lie in, one behind the other, each of which can be read by itself: its files, say."""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from core.data.bad_lines import BadLines, OnBadLine
from core.data.sections import Section, batches


class SourcePart(ABC):
    """Documents of a source in a fixed order."""

    travels = False
    """Whether another process can read it, and it can be pickled for that."""
    is_file = False
    """Whether it is named where it holds no document."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where a document that was just read lies, for errors."""

    @property
    def n_bytes(self) -> int:
        """How far it is read, in bytes on the disk."""
        return 0

    @abstractmethod
    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        """One pass over its documents in sections; what cannot be read goes to `bad`."""


class Reached(NamedTuple):
    """How far a part is read, where another process reads it."""

    n_bytes: int = 0


class LeftOutCounts(NamedTuple):
    """How many of something were left out, and the first."""

    count: int = 0
    first: str = ""

    def __add__(self, other: "LeftOutCounts") -> "LeftOutCounts":  # pyrefly: ignore[bad-override]
        return LeftOutCounts(self.count + other.count, self.first or other.first)


@dataclass(slots=True)
class PassCounts:
    """What a pass over parts of a source has found, and what it left out."""

    found: int = 0
    """Sections with a visible character."""
    bad: LeftOutCounts = field(default_factory=LeftOutCounts)
    blank: LeftOutCounts = field(default_factory=LeftOutCounts)
    empty: LeftOutCounts = field(default_factory=LeftOutCounts)

    @classmethod
    def of(cls, said: dict[str, Any]) -> "PassCounts":
        """What `asdict` says, read from JSON."""
        return cls(said.pop("found"), **{name: LeftOutCounts(*each) for name, each in said.items()})

    def add(self, other: "PassCounts") -> None:
        """Count what a pass over the next parts has found."""
        self.found += other.found
        self.bad, self.blank, self.empty = self.bad + other.bad, self.blank + other.blank, self.empty + other.empty


class SectionBatch(NamedTuple):
    """Sections that are read together."""

    packed: bytes
    """Their texts, pickled: they pass through a process that has no use for them."""
    opens: list[bool]
    closes: list[bool]
    characters: list[int]
    n_bytes: list[int]
    """Of each section in UTF-8."""
    read: int
    """How far the part is read behind it, in bytes on the disk."""

    @classmethod
    def of(cls, sections: Sequence[Section], read: int) -> "SectionBatch":
        texts = [section.text for section in sections]
        return cls(
            packed=pickle.dumps(texts),
            opens=[section.opens for section in sections],
            closes=[section.closes for section in sections],
            characters=[len(text) for text in texts],
            n_bytes=[len(text.encode()) for text in texts],
            read=read,
        )

    def sections(self) -> list[Section]:
        texts: list[str] = pickle.loads(self.packed)
        return [Section(*each) for each in zip(texts, self.opens, self.closes, strict=True)]

    def without_texts(self) -> "SectionBatch":
        return self._replace(packed=b"")

    @property
    def is_whole(self) -> bool:
        """Whether each of its sections is a document."""
        return all(self.opens) and all(self.closes)


def read_part(part: SourcePart, policy: OnBadLine, counts: PassCounts) -> Iterator[Section]:
    """The sections of a part that have a visible character; the others, and what cannot be read, are counted when the
    part ends. Raises `UserError` for what cannot be read unless the policy is "skip"."""
    bad, blank, n_read, found = BadLines(policy), BadLines("skip"), 0, 0
    for section in part.sections_of(bad):
        n_read += 1
        if section.is_blank:
            blank.add(part.place, "no visible character")
        else:
            found += 1
            yield section
    is_empty = part.is_file and n_read + bad.count == 0
    empty = LeftOutCounts(1, f"{part.place}: it holds no document") if is_empty else LeftOutCounts()
    unreadable, invisible = (LeftOutCounts(lines.count, lines.first) for lines in (bad, blank))
    counts.add(PassCounts(found, unreadable, invisible, empty))


def part_items(part: SourcePart, policy: OnBadLine, skip: int = 0) -> Iterator[SectionBatch | PassCounts]:
    """The batches of a part behind its first `skip` sections, and at last what was found in all of it."""
    counts = PassCounts()
    sections = read_part(part, policy, counts)
    for _ in zip(range(skip), sections, strict=False):
        pass
    for batch in batches(sections):
        yield SectionBatch.of(batch, part.n_bytes)
    yield counts
