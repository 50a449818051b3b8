"""What the words of a `dataset` setting stand for."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

from core.config.errors import UserError, at_most
from core.config.record import absolute
from core.data.bad_lines import BadLines, OnBadLine
from core.data.parts import Reached, SourcePart
from core.data.rows import RowReader
from core.data.sections import Section
from core.data.source import HUB, STANDARD_LIBRARY, HubDataset, Source, StandardLibrary, TextFiles
from core.data.text_files import Format

Dataset: TypeAlias = str | list[str] | Source.Config
_MOST_NAMES = 5


class SeveralSources(Source):
    """Sources one behind the other, as one."""

    @dataclass(kw_only=True, slots=True)
    class Config(Source.Config):
        sources: list[Source.Config] = field(default_factory=list)
        """What is read, in this order."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if not self.sources:
                yield "sources", "names nothing to read"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Source

    def open(self) -> None:
        self.sources: list[Source] = [source.build() for source in self.config.sources]
        self.on_bad_line = "error" if any(source.on_bad_line == "error" for source in self.sources) else "skip"
        self.name = ", ".join(at_most(_MOST_NAMES, [source.name for source in self.sources]))
        files = Counter(file for source in self.sources if isinstance(source, TextFiles) for file in source.files)
        if twice := [file for file, n in files.items() if n > 1]:
            raise UserError(f"{twice[0]} is named twice: it would be read twice")

    def read_rows_by(self, reader: RowReader) -> None:
        for source in self.sources:
            source.read_rows_by(reader)

    def fingerprint(self) -> list[Any]:
        return [source.fingerprint() for source in self.sources]

    def parts(self) -> list[SourcePart]:
        parts = [source.parts() for source in self.sources]
        self._n_parts = list(map(len, parts))
        return list(chain.from_iterable(parts))

    def reading(self, number: int, at: SourcePart | Reached) -> None:
        for source, n_parts in zip(self.sources, self._n_parts, strict=True):
            source.reading(min(max(number, 0), n_parts), at if 0 <= number < n_parts else Reached())
            number -= n_parts

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        for source in self.sources:
            yield from source.sections_of(bad)

    def done(self) -> float | None:
        known = [share for source in self.sources if (share := source.done()) is not None]
        return sum(known) / len(self.sources) if len(known) == len(self.sources) else None


def absolute_dataset(dataset: Dataset) -> Dataset:
    """A `dataset` setting that names the same text in any directory; a Config sees to its own places."""
    if isinstance(dataset, str):
        return absolute_word(dataset)
    return [absolute_word(word) for word in dataset] if isinstance(dataset, list) else dataset


def absolute_word(word: str) -> str:
    """The same of one word."""
    if word == STANDARD_LIBRARY:
        return word
    hub = HUB if word.startswith(HUB) else ""
    name = re.split("[:@#]", word.removeprefix(HUB))[0] if hub else word
    if hub and not os.path.isdir(name):  # a name at Hugging Face
        return word
    return f"{hub}{absolute(name)}{word[len(hub) + len(name) :]}"


def source_of(
    dataset: str, text_field: str, on_bad_line: OnBadLine, format: Format | None, section_characters: int | None = None
) -> Source.Config:
    """What a word stands for: `stdlib`; `hf:NAME` or `hf:NAME:SUBSET`, with `@SPLIT` and `#REVISION`; else files."""
    cut: dict[str, Any] = {"section_characters": section_characters}
    if dataset == STANDARD_LIBRARY:
        return StandardLibrary.Config(**cut)
    if dataset.startswith(HUB):
        address, _, revision = dataset.removeprefix(HUB).partition("#")
        address, _, split = address.partition("@")
        name, _, subset = address.partition(":")
        rows = {"text_field": text_field, "on_bad_line": on_bad_line, "revision": revision}
        return HubDataset.Config(dataset=name, subset=subset, split=split or "train", **rows, **cut)
    return TextFiles.Config(path=dataset, format=format, text_field=text_field, on_bad_line=on_bad_line, **cut)


def open_source(
    dataset: Dataset,
    text_field: str,
    on_bad_line: OnBadLine,
    format: Format | None = None,
    section_characters: int | None = None,
) -> Source:
    """The source that a `dataset` setting names; UserError when it is not there."""
    words = [dataset] if isinstance(dataset, str) else dataset
    if not isinstance(words, list):
        return words.build()
    sources = [source_of(word, text_field, on_bad_line, format, section_characters) for word in words]
    return (sources[0] if isinstance(dataset, str) else SeveralSources.Config(sources=sources)).build()
