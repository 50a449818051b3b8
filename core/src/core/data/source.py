"""Where text comes from: the standard library of the running Python, local files, or Hugging Face datasets."""

import importlib.util
import os
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import absolute
from core.data.bad_lines import BadLines, OnBadLine, reading
from core.data.library import library_errors
from core.data.parts import PassCounts, Reached, SourcePart, read_part
from core.data.rows import RowReader, TextField
from core.data.sections import Section, cut_row
from core.data.text_files import Format, TextFile, file_state, find_files

STANDARD_LIBRARY = "stdlib"
HUB = "hf:"
_SAVED = ("dataset_dict.json", "state.json")
"""One of these lies in a folder that `save_to_disk` wrote, of several splits or of one."""
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_TOPICS = "pydoc_data/topics.py"
_END = object()


class Source(Configurable, ABC):
    """Documents in a fixed order, which may be read any number of times."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        """What `dataset` may be instead of a word; the spellings of the finals of core are in `source_of`."""

    name: str
    """What errors and the head of a run call it."""
    on_bad_line: OnBadLine = "error"
    """What a document that cannot be read does, where `sections_of` reports it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.open()

    @abstractmethod
    def open(self) -> None:
        """State `name`, and find what is to be read. Raises `UserError` where it is not there."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """What changes when the text does (data for JSON), found without reading the text."""

    def parts(self) -> Sequence[SourcePart]:
        """What its documents lie in, in their order: all of it in one, which this process reads, unless it says
        otherwise."""
        return [WholeSource(self)]

    def reading(self, number: int, at: SourcePart | Reached) -> None:
        """Hear how far a pass is: through so many parts, and in the next."""

    def done(self) -> float | None:
        """Which share of a pass is read, from 0 to 1; None where that is not known."""
        return None

    def read_rows_by(self, reader: RowReader) -> None:
        """Read something else of a row than its text. Raises `UserError` where there are no rows."""
        raise UserError(f"{self.name} has no rows with fields: name files such as .jsonl or .parquet, or hf:NAME")

    @abstractmethod
    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        """One pass over all documents, each by `cut_row` if it is in memory; what cannot be read goes to `bad`."""

    def sections(self) -> Iterator[Section]:
        """One pass over the sections of all documents; documents without a visible character are left out, and counted.

        Raises UserError at an unreadable line (unless these are left out: their number is logged at the end of the
        pass) and at the end of a pass that found no document.
        """
        counts, number = PassCounts(), 0
        for number, part in enumerate(self.parts(), start=1):
            self.reading(number - 1, part)
            yield from read_part(part, self.on_bad_line, counts)
        self.reading(number, Reached())
        self.summarise(counts)

    def summarise(self, counts: PassCounts) -> None:
        """Log what a pass left out. Raises `UserError` where it found no document."""
        for left_out, what in (
            (counts.bad, "unreadable lines"),
            (counts.empty, "empty files"),
            (counts.blank, "empty documents"),
        ):
            BadLines("skip", *left_out).summarise(self.name, what)
        if not counts.found:
            left_out = f", with {counts.bad.count:,} unreadable lines left out" if counts.bad.count else ""
            raise UserError(f"{self.name} yields no text{left_out}")


class WholeSource(SourcePart):
    """All of a source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def place(self) -> str:
        return self.source.name

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        return self.source.sections_of(bad)


class RowSource(Source):
    """A source whose documents lie in rows."""

    reader: RowReader
    """What is read of a row; `open` states it."""

    def read_rows_by(self, reader: RowReader) -> None:
        self.reader = reader


class StandardLibrary(Source):
    """The .py files of the running Python's standard library without its tests, then the topics of `help()`.

    A file that Python itself could not decode (PEP 263) is passed over.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Source.Config):
        root: str | None = None
        """Its folder; None is that of the running Python."""
        section_characters: int | None = None
        """Longer documents are tokenised in sections of so many; None is 1,048,576."""

        def places(self) -> dict[str, Any]:
            return {"root": absolute(self.root)}

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Source
    on_bad_line = "skip"

    def open(self) -> None:
        self.name = STANDARD_LIBRARY
        self.root = Path(self.config.root or sysconfig.get_path("stdlib"))

    def fingerprint(self) -> list[Any]:
        with reading(self.root):
            return [sys.version, *([name, os.stat(f"{self.root}/{name}").st_size] for name in self._files())]

    def _files(self) -> list[str]:
        found = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
            inside = f"{folder[len(str(self.root)) :]}/".replace(os.sep, "/").lstrip("/")
            found += [inside + name for name in names if name.endswith(".py")]
        return sorted(name for name in found if name != _TOPICS)

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        for name in self._files():
            try:
                with reading(self.root / name), tokenize.open(self.root / name) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            if text.strip():  # an empty __init__.py is no document
                yield from cut_row(text, self.config.section_characters)
        for topic in sorted(topics):
            yield from cut_row(topics[topic], self.config.section_characters)


class TextFiles(RowSource):
    """Local files named by a path, a folder or a glob pattern."""

    @dataclass(kw_only=True, slots=True)
    class Config(RowSource.Config):
        path: str
        """A file, a folder or a glob pattern."""
        section_characters: int | None = None
        """Longer documents are tokenised in sections of so many; None is 131,072 of a text, 1,048,576 of a line or
        row."""
        format: Format | None = None
        """What all the files are, whatever their names say; None goes by their names."""
        text_field: str = "text"
        """The field of a line of JSON that holds the text."""
        on_bad_line: OnBadLine = "error"
        """Whether an unreadable line ends the run or is left out and counted."""

        def places(self) -> dict[str, Any]:
            return {"path": absolute(self.path)}

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Source

    def open(self) -> None:
        self.name, self.on_bad_line = self.config.path, self.config.on_bad_line
        self.reader = TextField(self.config.text_field, self.config.section_characters)
        with reading(self.name):
            self.files = find_files(self.name, self.config.format)
        self._found = [file_state(file) for file in self.files]
        self._read: tuple[int, SourcePart | Reached] = 0, Reached()

    def fingerprint(self) -> list[Any]:
        return self._found

    def parts(self) -> list[TextFile]:
        c = self.config
        return [
            TextFile(path, found, self.reader, c.format, c.section_characters)
            for path, found in zip(self.files, self._found, strict=True)
        ]

    def reading(self, number: int, at: SourcePart | Reached) -> None:
        self._read = number, at

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        for part in self.parts():
            yield from part.sections_of(bad)

    def done(self) -> float | None:
        (number, at), sizes = self._read, [size for _, size, _ in self._found]
        return (sum(sizes[:number]) + at.n_bytes) / max(sum(sizes), 1)


class HubDataset(RowSource):
    """A Hugging Face dataset, streamed."""

    @dataclass(kw_only=True, slots=True)
    class Config(RowSource.Config):
        dataset: str
        """Its name at Hugging Face, or a local folder that the package `datasets` can read."""
        subset: str = ""
        """One of its configurations; empty is the one that there is."""
        revision: str = ""
        """A branch, tag or commit at Hugging Face; empty is the newest of its main branch."""
        split: str = "train"
        """One of its splits."""
        section_characters: int | None = None
        """Longer documents are tokenised in sections of so many; None is 1,048,576."""
        text_field: str = "text"
        """The field of a row that holds the text."""
        on_bad_line: OnBadLine = "error"
        """Whether an unreadable row ends the run or is left out and counted."""

        def places(self) -> dict[str, Any]:
            return {"dataset": absolute(self.dataset) if os.path.isdir(self.dataset) else self.dataset}

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Source

    def open(self) -> None:
        c = self.config
        self.on_bad_line, self.reader = c.on_bad_line, TextField(c.text_field, c.section_characters)
        subset, split, revision = f":{c.subset}" * bool(c.subset), f"@{c.split}" * (c.split != "train"), c.revision
        dataset = self.name = f"{HUB}{c.dataset}{subset}{split}{f'#{revision}' * bool(revision)}"
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"{dataset} needs the package datasets: in the checkout run pip install './core[hf]'")
        import datasets

        if saved := [name for name in _SAVED if os.path.isfile(os.path.join(c.dataset, name))]:
            with library_errors(f"cannot open the saved dataset {dataset}"):
                found: Any = datasets.load_from_disk(c.dataset)
                splits = found if saved[0] == _SAVED[0] else {"train": found, str(found.split or "train"): found}
                files = [each["filename"] for split in splits.values() for each in split.cache_files]
                self._found: list[Any] = [file_state(Path(file)) for file in files]
        else:
            if not os.path.isdir(c.dataset) and "/" not in c.dataset and _is_format(c.dataset):
                raise UserError(f"{dataset} is a format and no dataset: name the files, without {HUB}")
            with library_errors(f"cannot open the Hugging Face dataset {dataset}"):
                builder = datasets.load_dataset_builder(c.dataset, c.subset or None, revision=c.revision or None)
                self._found = [builder.config_id, builder.hash]
                splits = cast(dict[str, Any], builder.as_streaming_dataset(None))
        if c.split not in splits:
            raise UserError(f"{dataset} has no split {c.split!r}; there are: {', '.join(splits) or 'none'}")
        self._rows = splits[c.split]

    def fingerprint(self) -> list[Any]:
        return self._found

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        with library_errors(f"cannot read the Hugging Face dataset {self.name}"):
            rows = iter(self._rows)
        for number in count(1):
            with library_errors(f"cannot read row {number:,} of the Hugging Face dataset {self.name}"):
                row = next(rows, _END)
            if row is _END:
                return
            yield from self.reader.sections(row, f"{self.name}, row {number}", bad)


def _is_format(name: str) -> bool:
    """Whether `datasets` takes a name for a way of reading files: all in the working directory."""
    from datasets import packaged_modules

    return name in packaged_modules._PACKAGED_DATASETS_MODULES
