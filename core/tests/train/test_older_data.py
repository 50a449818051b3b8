"""Text had a `mode` before data had classes: what command lines and files of that time say."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from toy_run import toy_run

from core.config.cli import override, split_flags
from core.config.decode import ConfigDecoder
from core.config.errors import UserError
from core.config.record import from_dict, to_dict
from core.config.validate import validate
from core.data.samples import Samples
from core.data.text import IndexedText, StreamedText

OLD = {
    "dataset": "books",
    "text_field": "body",
    "on_bad_line": "skip",
    "validation_fraction": 0.1,
    "cache_folder": "cache",
    "mode": "indexed",
    "shuffle": True,
    "epochs": 3,
}
SAME: dict[str, Any] = {name: OLD[name] for name in OLD if name != "mode"}
STREAM = "--dataloader.mode streaming --dataloader.no-shuffle"


def data_of(words: str, folder: Path) -> Samples.Config:
    """The data of a run with this command line."""
    run = toy_run(folder)
    run.dataloader = IndexedText.Config(dataset="books", text_field="body")
    override(run, split_flags(shlex.split(words)))
    validate(run)
    return run.dataloader


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataloader.dataset b", IndexedText.Config(dataset="b", text_field="body")),
        ("--dataloader.mode indexed", IndexedText.Config(dataset="books", text_field="body")),
        ("--dataloader.mode indexed --dataloader.epochs 2 --dataloader.no-shuffle",
         IndexedText.Config(dataset="books", text_field="body", epochs=2, shuffle=False)),
        (STREAM, StreamedText.Config(dataset="books", text_field="body")),
        ("--dataloader.shuffle false --dataloader.mode streaming",
         StreamedText.Config(dataset="books", text_field="body")),
        (f"--dataloader.epochs None --dataloader.dataset hf:a:b@c --dataloader.cache-folder x {STREAM}",
         StreamedText.Config(dataset="hf:a:b@c", text_field="body", cache_folder="x")),
        (f"{STREAM} --dataloader.mode indexed", IndexedText.Config(dataset="books", text_field="body", shuffle=False)),
    ],
)  # fmt: skip
def test_command_lines(words: str, expected: Samples.Config, tmp_path: Path) -> None:
    assert data_of(words, tmp_path) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataloader.mode streaming", "dataloader.shuffle: a stream is read in order: set shuffle to false"),
        (f"{STREAM} --dataloader.epochs 2", "dataloader.epochs: a stream has no known length"),
        ("--dataloader.mode stream", "dataloader.mode: expected indexed or streaming, got stream"),
        ("--dataloader.modes streaming", "no option --dataloader.modes"),
    ],
)
def test_command_lines_that_are_refused(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        data_of(words, tmp_path)


def test_files(tmp_path: Path) -> None:
    whole = to_dict(toy_run(tmp_path))
    found = from_dict({**whole, "dataloader": OLD}).dataloader
    assert found == IndexedText.Config(**SAME)
    stream = {**OLD, "mode": "streaming", "shuffle": False, "epochs": None}
    found = from_dict({**whole, "dataloader": stream}).dataloader
    assert found == StreamedText.Config(**{**SAME, "shuffle": False, "epochs": None})
    assert from_dict({**whole, "dataloader": {}}).dataloader == IndexedText.Config()
    for change, expected in [
        ({"mode": "streaming", "shuffle": False}, StreamedText.Config(**{**SAME, "shuffle": False, "epochs": 3})),
        ({"mode": "indexed", "dataset": "b"}, IndexedText.Config(**{**SAME, "dataset": "b"})),
        ({"dataset": "b"}, IndexedText.Config(**{**SAME, "dataset": "b"})),
    ]:
        run = from_dict({**whole, "dataloader": OLD})
        decoder = ConfigDecoder()
        decoder.onto(run, {"dataloader": change})
        assert (run.dataloader, decoder.problems) == (expected, [])
