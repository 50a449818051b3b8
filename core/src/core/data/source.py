"""Where text comes from: the standard library of the running Python, local files, or Hugging Face datasets."""

import importlib.util
import os
import re
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from core.config.errors import UserError
from core.config.record import absolute
from core.data.library import library_errors
from core.data.sections import Section, cut_row
from core.data.text_files import BadLines, OnBadLine, field_text, find_files, read_sections, reading

STANDARD_LIBRARY = "stdlib"
HUB = "hf:"
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_TOPICS = "pydoc_data/topics.py"
_END = object()


class Source(ABC):
    """Documents in a fixed order, which may be read any number of times."""

    def __init__(self, name: str, on_bad_line: OnBadLine) -> None:
        self.name = name
        self.on_bad_line: OnBadLine = on_bad_line

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """What changes when the text does (data for JSON), found without reading the text."""

    @abstractmethod
    def _sections(self, bad: BadLines) -> Iterator[Section]: ...

    def sections(self) -> Iterator[Section]:
        """One pass over the sections of all documents; documents without a visible character are left out.

        Raises UserError at an unreadable line (unless these are left out: their number is logged at the end of the
        pass) and at the end of a pass that found no document.
        """
        bad = BadLines(self.on_bad_line)
        found = False
        for section in self._sections(bad):
            if not section.is_blank:
                found = True
                yield section
        bad.summarise(self.name)
        if not found:
            left_out = f", with {bad.count:,} unreadable lines left out" if bad.count else ""
            raise UserError(f"{self.name} yields no text{left_out}")


class StandardLibrary(Source):
    """The .py files of the running Python's standard library without its tests, then the topics of `help()`.

    A file that Python itself could not decode (PEP 263) is passed over.
    """

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(STANDARD_LIBRARY, "error")
        self.root = root or Path(sysconfig.get_path("stdlib"))

    def fingerprint(self) -> list[Any]:
        with reading(self.root):
            return [sys.version, *([name, (self.root / name).stat().st_size] for name in self._files())]

    def _files(self) -> list[str]:
        found = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
            found += [Path(folder, name).relative_to(self.root).as_posix() for name in names if name.endswith(".py")]
        return sorted(name for name in found if name != _TOPICS)

    def _sections(self, bad: BadLines) -> Iterator[Section]:
        for name in self._files():
            try:
                with reading(self.root / name), tokenize.open(self.root / name) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            yield from cut_row(text)
        for topic in sorted(topics):
            yield from cut_row(topics[topic])


class TextFiles(Source):
    """Local files named by a path, a folder or a glob pattern."""

    def __init__(self, dataset: str, text_field: str, on_bad_line: OnBadLine) -> None:
        super().__init__(dataset, on_bad_line)
        self.text_field = text_field
        with reading(dataset):
            self.files = find_files(dataset)
        self._found = [self._state(file) for file in self.files]

    @staticmethod
    def _state(file: Path) -> list[Any]:
        with reading(file):
            found = file.stat()
        return [str(file), found.st_size, found.st_mtime_ns]

    def fingerprint(self) -> list[Any]:
        return self._found

    def _sections(self, bad: BadLines) -> Iterator[Section]:
        for file, found in zip(self.files, self._found, strict=True):
            self._check_unchanged(file, found)
            yield from read_sections(file, self.text_field, bad)
            self._check_unchanged(file, found)

    def _check_unchanged(self, file: Path, found: list[Any]) -> None:
        """Text that changes under a run would be read as something that its fingerprint does not stand for."""
        if self._state(file) != found:
            raise UserError(f"{file} has changed since the run began to read: start again once nothing writes there")


class HubDataset(Source):
    """A Hugging Face dataset, streamed: `hf:NAME`, `hf:NAME:CONFIG`, either with `@SPLIT` behind (default `train`).

    NAME may also be a local folder that the `datasets` package can read.
    """

    def __init__(self, dataset: str, text_field: str, on_bad_line: OnBadLine) -> None:
        super().__init__(dataset, on_bad_line)
        self.text_field = text_field
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"{dataset} needs the package datasets: in the checkout run pip install './core[hf]'")
        import datasets

        address, _, split = dataset.removeprefix(HUB).partition("@")
        name, _, config = address.partition(":")
        with library_errors(f"cannot open the Hugging Face dataset {dataset}"):
            self._builder = datasets.load_dataset_builder(name, config or None)
            self._rows = self._builder.as_streaming_dataset(split or "train")

    def fingerprint(self) -> list[Any]:
        return [self._builder.config_id, self._builder.hash]

    def _sections(self, bad: BadLines) -> Iterator[Section]:
        with library_errors(f"cannot read the Hugging Face dataset {self.name}"):
            rows = iter(self._rows)
        for number in count(1):
            with library_errors(f"cannot read row {number:,} of the Hugging Face dataset {self.name}"):
                row = next(rows, _END)
            if row is _END:
                return
            yield from field_text(row, self.text_field, f"{self.name}, row {number}", bad)


def absolute_dataset(dataset: str) -> str:
    """A `dataset` setting that names the same text in any directory."""
    if dataset == STANDARD_LIBRARY:
        return dataset
    hub = HUB if dataset.startswith(HUB) else ""
    name = re.split("[:@]", dataset.removeprefix(HUB))[0] if hub else dataset
    if hub and not os.path.isdir(name):  # a name at Hugging Face
        return dataset
    return f"{hub}{absolute(name)}{dataset[len(hub) + len(name) :]}"


def open_source(dataset: str, text_field: str, on_bad_line: OnBadLine) -> Source:
    """The source that a `dataset` setting names; UserError when it is not there."""
    if dataset == STANDARD_LIBRARY:
        return StandardLibrary()
    if dataset.startswith(HUB):
        return HubDataset(dataset, text_field, on_bad_line)
    return TextFiles(dataset, text_field, on_bad_line)
