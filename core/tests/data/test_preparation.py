"""Preparation by several processes, and after it was interrupted: the same files, byte for byte."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from core.config.errors import UserError
from core.data import preparation, sections, shards, workers
from core.data.corpus import Corpus
from core.data.dataset import open_source
from core.data.progress import ProgressLine
from core.data.tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus.Config:
    """200 documents, of which one is long, in many small batches and shards."""
    draw = random.Random(0)
    words = ["whale", "sea", "naïve", "\n\n", "12"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(200)]
    texts[70] = "a long one. " * 2000
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(sections, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(sections, "ROW_CHARACTERS", 1500)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(preparation, "JOURNAL_BYTES", 6000)
    return Corpus.Config(dataset=str(tmp_path / "text.jsonl"), validation_fraction=0.2)


def content(corpus: Corpus) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corpus.folder.iterdir() if file.name != "verified.json"}


def test_any_number_of_processes_writes_the_same_files(config: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        config.processes, config.cache_folder = processes, str(tmp_path / f"cache-{processes}")
        found.append(content(config.build(tokenizer=tokenizer)))
    assert found[0] == found[1] and len(found[0]) > 5


@pytest.mark.parametrize("after", [1, 9, 15])
def test_an_interrupted_preparation_continues(
    after: int, config: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config.cache_folder = str(tmp_path / "whole")
    whole = content(config.build(tokenizer=tokenizer))
    config.cache_folder = str(tmp_path / "torn")
    write, seen = preparation.SplitFiles.write, []

    def torn(self: Any, job: Any, tokens: Any) -> int:
        seen.append(job.first)
        n_bytes = write(self, job, tokens)
        if len(seen) == after:
            self.writers["train"]._starts.write(b"half a pla")  # what a crash leaves behind the last entry
            raise KeyboardInterrupt
        return n_bytes

    monkeypatch.setattr(preparation.SplitFiles, "write", torn)
    with pytest.raises(KeyboardInterrupt):
        config.build(tokenizer=tokenizer)
    corpora = Path(config.cache_folder) / "corpora"
    assert len(list(corpora.iterdir())) == (after > 1)  # one batch is not worth a journal
    done = len(seen)
    assert content(config.build(tokenizer=tokenizer)) == whole
    assert [path.name for path in corpora.iterdir()] == [Path(config.build(tokenizer=tokenizer).folder).name]
    went_on = [line for line in logged if "going on behind" in line]
    assert len(went_on) == (after > 1) and (seen[done] > 0) == (after > 1)


def test_a_mistake_in_the_text_leaves_nothing(config: Any, tokenizer: Tokenizer) -> None:
    with open(config.dataset, "a") as file:
        file.write("no JSON")
    for processes in (1, 2):
        config.processes = processes
        with pytest.raises(UserError, match="text.jsonl:201: not JSON"):
            config.build(tokenizer=tokenizer)
    assert not list(Path(config.dataset).parent.glob("cache/armature/corpora/*"))


def test_a_worker_that_dies_is_told(config: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    config.processes = 2
    start = workers._Worker.__init__

    def dies(self: Any, encoder: Any) -> None:
        start(self, encoder)
        self._process.kill()

    monkeypatch.setattr(workers._Worker, "__init__", dies)
    with pytest.raises(UserError, match="a process that tokenises ended with code -9, out of memory perhaps"):
        config.build(tokenizer=tokenizer)


def test_the_line_says_how_long_it_will_take(config: Any, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    source = open_source(config.dataset, "text", "error")
    assert source.done() == 0
    shares = [source.done() for _ in source.sections()]
    assert shares == sorted(shares) and shares[0] < 1 and source.done() == 1
    clock = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    done = iter([0.25, 0.5])
    with ProgressLine("set", lambda: next(done)) as progress:
        progress.add(1, 1_000_000)
        progress.add(1, 1_000_000)
    assert logged[-1].endswith("2 documents, 2.0 MB, 0.0 MB/s, 50%, 1:40 left")
