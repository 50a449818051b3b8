"""What the words of a `dataset` setting stand for."""

import os
import re

from core.config.record import absolute
from core.data.bad_lines import OnBadLine
from core.data.source import HUB, STANDARD_LIBRARY, HubDataset, Source, StandardLibrary, TextFiles
from core.data.text_files import Format


def absolute_dataset(dataset: str) -> str:
    """A word of a `dataset` setting that names the same text in any directory."""
    if dataset == STANDARD_LIBRARY:
        return dataset
    hub = HUB if dataset.startswith(HUB) else ""
    name = re.split("[:@]", dataset.removeprefix(HUB))[0] if hub else dataset
    if hub and not os.path.isdir(name):  # a name at Hugging Face
        return dataset
    return f"{hub}{absolute(name)}{dataset[len(hub) + len(name) :]}"


def source_of(dataset: str, text_field: str, on_bad_line: OnBadLine, format: Format | None) -> Source.Config:
    """What a word stands for: `stdlib`; `hf:NAME` or `hf:NAME:SUBSET`, either with `@SPLIT` behind; else files."""
    if dataset == STANDARD_LIBRARY:
        return StandardLibrary.Config()
    if dataset.startswith(HUB):
        address, _, split = dataset.removeprefix(HUB).partition("@")
        name, _, subset = address.partition(":")
        rows = {"text_field": text_field, "on_bad_line": on_bad_line}
        return HubDataset.Config(dataset=name, subset=subset, split=split or "train", **rows)
    return TextFiles.Config(path=dataset, format=format, text_field=text_field, on_bad_line=on_bad_line)


def open_source(
    dataset: str | Source.Config, text_field: str, on_bad_line: OnBadLine, format: Format | None = None
) -> Source:
    """The source that a `dataset` setting names; UserError when it is not there."""
    return (source_of(dataset, text_field, on_bad_line, format) if isinstance(dataset, str) else dataset).build()
