"""Preparation by several processes, and after it was interrupted: the same files, byte for byte."""

import bz2
import gzip
import json
import lzma
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.config.errors import UserError
from core.data import merge, preparation, sections, shards, workers
from core.data.bad_lines import BadLines
from core.data.corpus import Corpus
from core.data.dataset import SeveralSources, open_source
from core.data.progress import ProgressLine
from core.data.sampling import SPLITS
from core.data.sections import LeftOut, Section, cut_row
from core.data.source import Source, StandardLibrary, TextFiles
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
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(preparation, "JOURNAL_BYTES", 6000)
    return Corpus.Config(dataset=str(tmp_path / "text.jsonl"), validation_fraction=0.2, section_characters=1500)


def content(corpus: Corpus) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corpus.folder.iterdir() if file.name != "verified.json"}


def test_any_number_of_processes_writes_the_same_files(config: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        config.processes, config.cache_folder = processes, str(tmp_path / f"cache-{processes}")
        found.append(content(config.build(tokenizer=tokenizer)))
    assert found[0] == found[1] and len(found[0]) > 5


@pytest.fixture
def several(config: Any, tmp_path: Path) -> Corpus.Config:
    """Files of several kinds, with long documents, blank ones, lines that are none, and a file without any."""
    lines = (tmp_path / "text.jsonl").read_bytes().splitlines(keepends=True)
    (folder := tmp_path / "several").mkdir()
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(b"".join(lines[:90])))
    (folder / "b.txt").write_text("A line of text.\n\n" * 9000)
    (folder / "c.jsonl").write_bytes(b"")
    (folder / "d.jsonl.bz2").write_bytes(bz2.compress(b'no JSON\n{"text": " "}\n' + b"".join(lines[90:150])))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[150:]) + b"neither\n"))
    (three := tmp_path / "three").mkdir()
    for name in "xyz":
        (three / f"{name}.py").write_text(f"# {name}\n" * 900)
    library = StandardLibrary.Config(root=str(three), section_characters=1500)
    files = TextFiles.Config(path=str(folder), on_bad_line="skip", section_characters=1500)
    config.dataset = SeveralSources.Config(sources=[files, library])
    return config


def test_parts_of_several_kinds_become_the_same_files(
    several: Any, tokenizer: Tokenizer, tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.data.source.topics", {"topic": "All there is about it."})
    found, said = [], []
    for processes in (1, 2, 4):
        several.processes, several.cache_folder = processes, str(tmp_path / f"cache-{processes}")
        logged.clear()
        found.append(content(several.build(tokenizer=tokenizer)))
        said.append([line for line in logged if "left out" in line or "long documents" in line])
    assert found[0] == found[1] == found[2] and len(found[0]) > 5
    assert said[0] == said[1] == said[2] and len(said[0]) == 4
    assert "left out 2 unreadable lines; the first: " in said[0][0] and "d.jsonl.bz2:1: not JSON" in said[0][0]
    assert "left out 1 empty files; the first: " in said[0][1] and "c.jsonl: it holds no document" in said[0][1]


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_that_were_written_are_not_read_again(
    processes: int, several: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.data.source.topics", {"topic": "All there is about it."})
    several.processes = processes
    several.cache_folder = str(tmp_path / "whole")
    whole = content(several.build(tokenizer=tokenizer))
    several.cache_folder = str(tmp_path / "torn")
    write, begun = preparation.SplitFiles.write, []
    for last in (1, 3):  # the number of the part in which it is interrupted

        def torn(self: Any, pieces: Any, last: int = last) -> tuple[int, int]:
            if self.part > last:
                raise KeyboardInterrupt
            return write(self, pieces)

        monkeypatch.setattr(preparation.SplitFiles, "write", torn)
        with pytest.raises(KeyboardInterrupt):
            several.build(tokenizer=tokenizer)
    monkeypatch.setattr(preparation.SplitFiles, "write", write)
    items = merge.Reader.items
    monkeypatch.setattr(merge.Reader, "items", lambda self, *place: (begun.append(place[:2]), items(self, *place))[1])
    assert content(several.build(tokenizer=tokenizer)) == whole
    assert begun[0][0] >= 3


@pytest.mark.parametrize("after", [1, 9, 15])
def test_an_interrupted_preparation_continues(
    after: int, config: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config.cache_folder = str(tmp_path / "whole")
    whole = content(config.build(tokenizer=tokenizer))
    config.cache_folder = str(tmp_path / "torn")
    write, seen = preparation.SplitFiles.write, []

    def torn(self: Any, pieces: Any) -> tuple[int, int]:
        seen.append(self.next)
        found = write(self, pieces)
        if len(seen) == after:
            self.writers["train"]._starts.write(b"half a pla")  # what a crash leaves behind the last entry
            raise KeyboardInterrupt
        return found

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


def killed(settings: dict[str, Any], place: int) -> int:
    """The exit code of a preparation that is to be killed at this place of what it writes."""
    program = Path(__file__).with_name("killed_preparation.py")
    command = [sys.executable, str(program), json.dumps(settings), str(place)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


def test_a_killed_preparation_continues(config: Any, tokenizer: Tokenizer, tmp_path: Path, logged: list[str]) -> None:
    config.cache_folder = str(tmp_path / "whole")
    whole = content(config.build(tokenizer=tokenizer))
    config.cache_folder = str(tmp_path / "torn")
    settings = {
        name: getattr(config, name) for name in ("dataset", "validation_fraction", "section_characters", "cache_folder")
    }
    assert killed(settings, 60) == -signal.SIGKILL
    assert content(config.build(tokenizer=tokenizer)) == whole
    assert len([line for line in logged if "going on behind" in line]) == 1


@pytest.mark.faults
def test_kills_at_random_moments_change_nothing(config: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config.cache_folder = str(tmp_path / "whole")
    whole, draw, n_kills = content(config.build(tokenizer=tokenizer)), random.Random(1), 0
    for number in range(12):
        settings = {"dataset": config.dataset, "validation_fraction": 0.2, "section_characters": 1500}
        settings["processes"] = 1 + number % 2
        settings["cache_folder"] = config.cache_folder = str(tmp_path / f"torn-{number}")
        while (code := killed(settings, draw.randint(1, 120))) == -signal.SIGKILL:
            n_kills += 1
        assert code == 0 and content(config.build(tokenizer=tokenizer)) == whole
    assert n_kills >= 12


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
    start = workers.Worker.__init__

    def dies(self: Any, work: Any) -> None:
        start(self, work)
        if work.name == dying:
            self._process.kill()

    monkeypatch.setattr(workers.Worker, "__init__", dies)
    for dying in ("tokenises", "reads text"):
        with pytest.raises(UserError, match=f"a process that {dying} ended with code -9, out of memory perhaps"):
            config.build(tokenizer=tokenizer)


def test_the_line_says_how_long_it_will_take(config: Any, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    source = open_source(config.dataset, "text", "error")
    assert source.done() == 0
    shares = [source.done() for _ in source.sections()]
    assert shares == sorted(shares) and shares[0] < 1 and source.done() == 1
    clock = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr("core.data.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    done = iter([0.25, 0.5])
    with ProgressLine("set", lambda: next(done)) as progress:
        progress.add(1, 1_000_000)
        progress.add(1, 1_000_000)
    assert logged[-1].endswith("2 documents, 2.0 MB, 0.0 MB/s, 50%, 1:40 left")


class Generated(Source):
    """Documents that are made up as they are read."""

    @dataclass(kw_only=True, slots=True)
    class Config(Source.Config):
        gigabytes: float

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Source
    most_bytes = 0
    """The largest memory that this process had while such was read."""

    def open(self) -> None:
        self.name = "generated"

    def fingerprint(self) -> list[Any]:
        return [self.config.gigabytes]

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        text = "Call me Ishmael. Some years ago, never mind how long.\n\n" * 2000
        for number in range(int(self.config.gigabytes * 1e9 / len(text))):
            yield from cut_row(f"{number} {text}")
            if number % 100 == 0:
                Generated.most_bytes = max(Generated.most_bytes, resident_bytes())


class Lines:
    """A tokenizer that takes hardly any time: a token is the length of a line."""

    vocab_size, fingerprint = 100, "lines"

    def encode_sections(self, sections: Sequence[Section]) -> list[list[int] | LeftOut]:
        return [list(map(len, section.text.split("\n"))) for section in sections]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


GIGABYTES = 10.0


@pytest.mark.soak
def test_ten_gigabytes_take_little_memory(tmp_path: Path) -> None:
    gigabytes, before = GIGABYTES, resident_bytes()
    config = Corpus.Config(dataset=Generated.Config(gigabytes=gigabytes), cache_folder=str(tmp_path), processes=1)
    corpus = Corpus(config, tokenizer=Lines())
    assert sum(corpus.split(split).extent.bytes for split in SPLITS) == pytest.approx(gigabytes * 1e9, rel=1e-3)
    print(f"{gigabytes} GB: {(Generated.most_bytes - before) / 2**20:.0f} MiB more than before")
    assert Generated.most_bytes - before < 200 * 2**20
