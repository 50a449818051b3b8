"""What the words of a `dataset` setting stand for."""

import os
import re
from typing import TypeAlias

from core.config.record import absolute
from core.data.bad_lines import OnBadLine
from core.data.source import (
    HUB,
    STANDARD_LIBRARY,
    HubDataset,
    SeveralSources,
    Source,
    StandardLibrary,
    TextFiles,
)
from core.data.text_files import Format

Dataset: TypeAlias = str | list[str] | Source.Config


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


def source_of(dataset: str, text_field: str, on_bad_line: OnBadLine, format: Format | None) -> Source.Config:
    """What a word stands for: `stdlib`; `hf:NAME` or `hf:NAME:SUBSET`, with `@SPLIT` and `#REVISION`; else files."""
    if dataset == STANDARD_LIBRARY:
        return StandardLibrary.Config()
    if dataset.startswith(HUB):
        address, _, revision = dataset.removeprefix(HUB).partition("#")
        address, _, split = address.partition("@")
        name, _, subset = address.partition(":")
        rows = {"text_field": text_field, "on_bad_line": on_bad_line, "revision": revision}
        return HubDataset.Config(dataset=name, subset=subset, split=split or "train", **rows)
    return TextFiles.Config(path=dataset, format=format, text_field=text_field, on_bad_line=on_bad_line)


def open_source(dataset: Dataset, text_field: str, on_bad_line: OnBadLine, format: Format | None = None) -> Source:
    """The source that a `dataset` setting names; UserError when it is not there."""
    if isinstance(dataset, list):
        sources = [source_of(word, text_field, on_bad_line, format) for word in dataset]
        return SeveralSources.Config(sources=sources).build()
    return (source_of(dataset, text_field, on_bad_line, format) if isinstance(dataset, str) else dataset).build()
