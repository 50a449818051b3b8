import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from core.config.errors import UserError
from core.config.validate import validate
from core.data import corpus as corpus_module
from core.data import progress as progress_module
from core.data import sections as sections_module
from core.data import text_files
from core.data.corpus import Corpus
from core.data.progress import ProgressLine
from core.data.sampling import SPLITS, held_out
from core.data.shards import Extent, TokenManifest
from core.data.split_writer import SplitWriter
from core.data.tokenizer import Tokenizer
from core.runtime.units import rate

TEXTS = [f"Document {i} says {'something ' * (i % 7)}and ends.\n" for i in range(60)]


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def config(dataset, tmp_path) -> Corpus.Config:
    return Corpus.Config(dataset=str(dataset), cache_folder=str(tmp_path / "kept"), validation_fraction=0.2)


def tokens_of(corpus, split) -> list[int]:
    stream = corpus.split(split)
    tokens, _ = stream.windows(np.array([0]), stream.extent.tokens - 1)
    return tokens[0].tolist()


def check_content(corpus, tokenizer) -> None:
    chosen = held_out(0, len(TEXTS), 0.2)
    for split, texts in (
        ("train", [text for text, held in zip(TEXTS, chosen, strict=True) if not held]),
        ("validation", [text for text, held in zip(TEXTS, chosen, strict=True) if held]),
    ):
        expected = [token for ids in tokenizer.encode_documents(texts) for token in ids]
        assert tokens_of(corpus, split) == expected
        n_bytes = sum(len(text.encode()) for text in texts)
        assert corpus.split(split).extent == Extent(
            documents=len(texts), tokens=len(expected), bytes=n_bytes, sections=len(texts)
        )


def count_preparations(monkeypatch) -> list[str]:
    """Each preparation from now on adds an entry."""
    counted, write = [], corpus_module.write_splits
    monkeypatch.setattr(corpus_module, "write_splits", lambda *a: counted.append("prepared") or write(*a))
    return counted


def test_every_document_is_in_its_split_once(config, tokenizer, monkeypatch):
    for size in (1, 300, 2**20):
        monkeypatch.setattr(sections_module, "_BATCH_CHARACTERS", size)
        config.cache_folder += str(size)
        check_content(config.build(tokenizer=tokenizer), tokenizer)


def test_second_use_finds_the_cache(config, tokenizer, monkeypatch, tmp_path):
    counted = count_preparations(monkeypatch)
    corpus = config.build(tokenizer=tokenizer)
    assert corpus.folder.parent == tmp_path / "kept" / "corpora" and corpus.folder.name.startswith("set-jsonl-")
    assert [path.name for path in corpus.folder.parent.iterdir()] == [corpus.folder.name]
    again = config.build(tokenizer=tokenizer)
    assert counted == ["prepared"] and again.folder == corpus.folder
    check_content(again, tokenizer)
    extent = corpus.split("train").extent
    size = f"{extent.documents} documents, {rate(extent.tokens)} tokens"
    assert corpus.describe("train") == f"{config.dataset}: {size} (train), cached in {corpus.folder}"


def test_whatever_changes_the_tokens_changes_the_place(config, dataset, tokenizer, tmp_path):
    class OtherTokenizer(Tokenizer):
        def __init__(self, config):
            super().__init__(config)
            self.fingerprint = "other"

    folders = [config.build(tokenizer=tokenizer).folder, config.build(tokenizer=OtherTokenizer.Config().build()).folder]
    config.validation_fraction = 0.3
    folders.append(config.build(tokenizer=tokenizer).folder)
    config.on_bad_line = "skip"
    folders.append(config.build(tokenizer=tokenizer).folder)
    dataset.write_text('{"text": "x", "body": "y"}\n' * 20)
    folders.append(config.build(tokenizer=tokenizer).folder)
    config.text_field = "body"
    folders.append(config.build(tokenizer=tokenizer).folder)
    dataset.rename(tmp_path / "other.jsonl")
    config.dataset = str(tmp_path / "other.jsonl")
    folders.append(config.build(tokenizer=tokenizer).folder)
    assert len(set(folders)) == len(folders) == 7


@pytest.mark.parametrize("damage", ["shard", "manifest"])
def test_damaged_cache_is_named_and_prepared_anew(config, tokenizer, logged, damage):
    corpus = config.build(tokenizer=tokenizer)
    if damage == "shard":
        (corpus.folder / "train-00000.tokens").write_bytes(b"short")
    else:
        (corpus.folder / "manifest.json").unlink()
    assert logged == []
    check_content(config.build(tokenizer=tokenizer), tokenizer)
    assert len(logged) == 1
    assert logged[0].startswith(f"WARNING: the prepared corpus {corpus.folder} is damaged (")
    assert [path.name for path in corpus.folder.parent.iterdir()] == [corpus.folder.name]


@pytest.mark.parametrize("where", ["encode_sections", "manifest"])
def test_exception_while_preparing_leaves_nothing(config, tokenizer, monkeypatch, where, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*(Tokenizer, where, stop) if where == "encode_sections" else (TokenManifest, "write", stop))
        with pytest.raises(KeyboardInterrupt):
            config.build(tokenizer=tokenizer)
    assert list((tmp_path / "kept" / "corpora").iterdir()) == []
    check_content(config.build(tokenizer=tokenizer), tokenizer)


KILLED = """
import os, signal, sys
from core.data import corpus, sections, shards
from core.data.tokenizer import Tokenizer
from core.runtime.units import rate
sections._BATCH_CHARACTERS = 300
when, dataset, cache = sys.argv[1:]
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if when == "half":
    encode, texts_left = Tokenizer.encode_sections, iter(range(3))
    Tokenizer.encode_sections = lambda *args: die() if next(texts_left, None) is None else encode(*args)
elif when == "terminated":
    shards.TokenManifest.write = lambda *args: os.kill(os.getpid(), signal.SIGTERM)
else:
    corpus.Corpus._publish = die
config = corpus.Corpus.Config(dataset=dataset, cache_folder=cache, validation_fraction=0.2)
config.build(tokenizer=Tokenizer.Config().build())
"""


@pytest.mark.parametrize("when", ["half", "terminated", "before the move"])
def test_killed_preparation_leaves_nothing_that_looks_complete(config, tokenizer, logged, when, monkeypatch):
    command = [sys.executable, "-c", KILLED, when, config.dataset, config.cache_folder]
    assert subprocess.run(command).returncode == -(signal.SIGTERM if when == "terminated" else signal.SIGKILL)
    [left] = (Path(config.cache_folder) / "corpora").iterdir()
    counted = count_preparations(monkeypatch)
    corpus = config.build(tokenizer=tokenizer)
    assert counted == ["prepared"]
    assert logged == [f"INFO: removed {left}, which an interrupted preparation left"]
    assert list((Path(config.cache_folder) / "corpora").iterdir()) == [corpus.folder]
    check_content(corpus, tokenizer)


AT_ONCE = """
import sys, time
from pathlib import Path
from core.data import corpus, sections
from core.data.tokenizer import Tokenizer
from core.runtime.units import rate
dataset, cache, here, other = sys.argv[1:]
sections._BATCH_CHARACTERS = 300
encode = Tokenizer.encode_sections
def meet(self, texts):
    Path(here).touch()
    while not Path(other).exists():
        time.sleep(0.001)
    return encode(self, texts)
Tokenizer.encode_sections = meet
config = corpus.Corpus.Config(dataset=dataset, cache_folder=cache, validation_fraction=0.2)
stream = config.build(tokenizer=Tokenizer.Config().build()).split("train")
print(stream.extent.tokens)
"""


@pytest.mark.parametrize("damaged_before", [None, "manifest.json", "train-00000.tokens"])
def test_two_preparations_at_once_end_with_one_right_cache(config, tokenizer, tmp_path, damaged_before, monkeypatch):
    if damaged_before:
        file = config.build(tokenizer=tokenizer).folder / damaged_before
        file.write_bytes(b"\1" * file.stat().st_size)
    marks = [str(tmp_path / "first"), str(tmp_path / "second")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, config.dataset, config.cache_folder, *order],
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in (marks, marks[::-1])
    ]
    outputs = [process.communicate(timeout=60)[0].split()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    counted = count_preparations(monkeypatch)
    corpus = config.build(tokenizer=tokenizer)
    assert counted == []
    assert outputs == [str(corpus.split("train").extent.tokens)] * 2
    check_content(corpus, tokenizer)
    assert [path.name for path in corpus.folder.parent.iterdir()] == [corpus.folder.name]


def test_the_slower_of_two_preparations_takes_what_the_quicker_made(config, tokenizer, monkeypatch):
    write, quicker = corpus_module.write_splits, []

    def slow(*args):
        if not quicker:
            quicker.append(None)
            quicker[0] = config.build(tokenizer=tokenizer).folder.stat().st_ino
        return write(*args)

    monkeypatch.setattr(corpus_module, "write_splits", slow)
    corpus = config.build(tokenizer=tokenizer)
    assert corpus.folder.stat().st_ino == quicker[0]
    check_content(corpus, tokenizer)


def test_cache_folder(config, tokenizer, tmp_path, monkeypatch):
    config.cache_folder = None
    assert config.build(tokenizer=tokenizer).folder.parent == tmp_path / "cache" / "armature" / "corpora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config.build(tokenizer=tokenizer).folder.parent == tmp_path / "home/.cache/armature/corpora"
    config.cache_folder, config.dataset = "~/mine", str(Path(config.dataset).with_name("*.*"))
    folder = config.build(tokenizer=tokenizer).folder
    assert folder.parent == tmp_path / "home/mine/corpora" and folder.name.isalnum()


def test_cache_folder_that_cannot_be_written(config, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    config.cache_folder = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"cannot keep .*file/below.*choose another place with cache_folder"):
        config.build(tokenizer=tokenizer)

    def full(*args):
        raise OSError(28, "No space left on device")

    config.cache_folder = str(tmp_path / "kept")
    monkeypatch.setattr(SplitWriter, "write", full)
    with pytest.raises(
        UserError, match=r"cannot keep .*No space left on device.*choose another place with cache_folder"
    ):
        config.build(tokenizer=tokenizer)
    assert list((tmp_path / "kept" / "corpora").iterdir()) == []


def test_user_errors_of_the_source_pass_through(config, tokenizer, dataset):
    with open(dataset, "a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"set\.jsonl:61: not JSON"):
        config.build(tokenizer=tokenizer)
    assert list((Path(config.cache_folder) / "corpora").iterdir()) == []


def test_sections_of_another_length_are_another_corpus(tmp_path, tokenizer, logged):
    (tmp_path / "a.txt").write_text("some words\n\n" * 500)
    usual, short = (
        Corpus.Config(dataset=str(tmp_path / "a.txt"), section_characters=n, validation_fraction=0.0).build(
            tokenizer=tokenizer
        )
        for n in (None, 1000)
    )
    assert usual.folder != short.folder
    assert "1 documents in 7 sections cut at blank lines, " in short.describe("train")
    assert "1 documents, " in usual.describe("train")
    assert [line for line in logged if "long documents" in line] == [
        f"INFO: {tmp_path / 'a.txt'}: 1 long documents were tokenised in 7 sections, cut at blank lines where there "
        "are any, with nothing between them (section_characters)"
    ]


def test_settings_are_checked():
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"validation_fraction: must be at least 0 and below 1, not {fraction}"):
            validate(Corpus.Config(validation_fraction=fraction))
    with pytest.raises(UserError, match="on_bad_line"):
        validate(Corpus.Config(on_bad_line="ignore"))
    with pytest.raises(UserError, match="section_characters 10 must be from 1,000 to 268,435,456: leave it out"):
        validate(Corpus.Config(section_characters=10))
    validate(Corpus.Config(validation_fraction=0.0))


def test_preparation_needs_no_more_memory_for_more_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sections_module, "_BATCH_CHARACTERS", 2**13)
    monkeypatch.setattr(text_files, "FILE_CHARACTERS", 2**13)
    peaks = []
    for n_lines in (2_000, 20_000):
        path = tmp_path / f"{n_lines}.txt"
        path.write_text(("word " * 19 + "word\n") * n_lines)
        tracemalloc.start()
        try:
            corpus = Corpus.Config(dataset=str(path), processes=1).build(tokenizer=tokenizer)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert sum(corpus.split(split).extent.bytes for split in SPLITS) == path.stat().st_size == 100 * n_lines
    assert peaks[1] < 1.2 * peaks[0]


def test_progress_is_a_live_line_on_a_terminal_only(monkeypatch, capsys, logged):
    monkeypatch.setattr(progress_module, "_LIVE_INTERVAL_S", 1e-9)
    monkeypatch.setattr(progress_module, "_LOG_INTERVAL_S", 1e-9)
    with ProgressLine("set") as progress:
        progress.add(2000, 3_000_000)
    assert capsys.readouterr().err == ""
    assert len(logged) == 1 and logged[0].startswith("INFO: tokenising set: 2,000 documents, 3.0 MB, ")
    assert logged[0].endswith(" MB/s")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ProgressLine("set") as progress:
        progress.add(1, 1)
    shown = capsys.readouterr().err
    assert shown.startswith("\rtokenising set: 1 documents, 0.0 MB, ") and shown.endswith("\r\033[K")
    assert "\n" not in shown
    assert len(logged) == 1
    monkeypatch.setattr(progress_module, "_LIVE_INTERVAL_S", 100.0)
    with ProgressLine("set") as progress:
        progress.add(1, 1)
    assert capsys.readouterr().err == "\r\033[K"
