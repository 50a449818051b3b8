"""Long documents: read, tokenised and dealt out in sections, and one document all the same."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.data import sections as sections_module
from core.data import streaming, text_files
from core.data.corpus import Corpus
from core.data.sampling import SPLITS, held_out
from core.data.sections import Section, batches, cut_row, settled, split_sections
from core.data.text import IndexedText, StreamedText
from core.data.tokenizer import Tokenizer

PARAGRAPHS = [f"Paragraph {i} of the book\n  says {'something ' * (i % 5)}and ends.\n" for i in range(60)]
BOOK = "\n".join(PARAGRAPHS)


@pytest.mark.parametrize("part", [1, 7, 100, 10_000])
@pytest.mark.parametrize("limit", [1, 2, 50, 99, 100_000])
@pytest.mark.parametrize(
    "text", [BOOK, BOOK.replace("\n", " "), "x" * 999, "\n" * 300, " " * 300, "\n\n" + "y" * 99, ""]
)
def test_sections_make_up_the_text(text, limit, part):
    found = list(split_sections((text[i : i + part] for i in range(0, len(text), part)), limit))
    assert "".join(section.text for section in found) == text
    assert all(len(section.text) <= limit for section in found)
    assert all(found[i].text for i in range(len(found))) or found == [Section("")]
    assert [section.opens for section in found] == [True] + [False] * (len(found) - 1)
    assert [section.closes for section in found] == [False] * (len(found) - 1) + [True]
    assert len(found) <= 2 * len(text) / limit + 1 or limit < 3


def test_cuts_lie_at_blank_lines_else_lines_else_words():
    for text, begins in ((BOOK, "Paragraph"), (BOOK.replace("\n\n", "\n"), ("Paragraph", "  says"))):
        assert all(section.text.startswith(begins) for section in split_sections([text], 300))
    for first, second in zip(words := list(split_sections([BOOK.replace("\n", " ")], 300)), words[1:], strict=False):
        assert second.text[0] == " " != first.text[-1]
    assert [section.text for section in split_sections(["one two    three"], 10)] == ["one two", "    three"]


def test_a_long_row_is_cut_in_time_that_grows_with_it(monkeypatch):
    monkeypatch.setattr(sections_module, "ROW_CHARACTERS", 1000)
    monkeypatch.setattr(sections_module, "_PART_CHARACTERS", 100)
    copied = 0

    class Text(str):
        def __getitem__(self, index):
            nonlocal copied
            taken = str(self)[index]
            copied += len(taken)
            return taken

    text = Text("word " * 20_000)
    assert "".join(section.text for section in cut_row(text)) == text and copied == len(text)


def test_settled():
    book = [Section("a", closes=False), Section("b", opens=False, closes=False), Section("c", opens=False)]
    short = Section("d")
    assert settled([*book, short], [1, 1, 1, 1, 1, 1]) == [*book, short]
    apart = [Section("a"), Section("b"), Section("c"), short]
    assert settled([*book, short], [0, 0, 1, 0, 0, 1]) == apart
    assert settled(book[1:2], [1, 1, 0]) == [Section("b", opens=False)]
    assert settled(book[1:2], [0, 1, 1]) == [Section("b", closes=False)]


def test_batches():
    parts = [Section("x" * n) for n in (3, 2**20, 1, 2**19, 2**19, 5)]
    assert [len(batch) for batch in batches(iter(parts))] == [2, 3, 1]


# Tokens of sections


@pytest.fixture(scope="module")
def spaced(tmp_path_factory) -> Tokenizer:
    """A SentencePiece model as they usually are: every text begins with a space, white space is not kept."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spaced")
    (folder / "text").write_text(BOOK)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "usual"), vocab_size=300, byte_fallback=True,
        minloglevel=2, model_type="bpe", hard_vocab_limit=False,
    )  # fmt: skip
    return Tokenizer.Config(path=str(folder / "usual.model")).build()


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory) -> Tokenizer:
    """A byte-level tokenizer.json that puts a space in front of every text, with bos and eos."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    folder = tmp_path_factory.mktemp("prefixed")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator([BOOK], trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
    return Tokenizer.Config(path=str(folder)).build()


@pytest.mark.parametrize("name", ["bundled", "spaced", "prefixed"])
@pytest.mark.parametrize("text", [BOOK, re.sub("\n+ *", "\n", BOOK), BOOK.replace("\n", " ")])
def test_sections_are_encoded_as_the_whole_is(request, tokenizer, name, text):
    chosen = tokenizer if name == "bundled" else request.getfixturevalue(name)
    [whole] = chosen.encode_documents([text])
    parts = list(split_sections([text], 300))
    ids = [token for part in chosen.encode_sections(parts) for token in part]
    assert len(parts) > 10 and ids == whole


def test_any_sections_of_a_text_give_it_back(tokenizer):
    draw = random.Random(0)
    letters = ["\n", " ", "  ", "\n\n\n", "\u2581", "é", "日本", "word", "👩", "\r\n", "\t"]
    for _ in range(100):
        text = "".join(draw.choice(letters) for _ in range(60))
        encoded = tokenizer.encode_sections(list(split_sections([text], draw.randrange(3, 30))))
        assert tokenizer.decode([token for ids in encoded for token in ids]) == text
        assert [encoded[0][0], encoded[-1][-1]] == [tokenizer.bos_id, tokenizer.eos_id]
        assert not any({tokenizer.bos_id, tokenizer.eos_id} & set(ids) for ids in (encoded[0][1:], *encoded[1:-1]))


# Corpora and streams


@pytest.fixture
def short_sections(monkeypatch) -> None:
    for module in (text_files, sections_module):
        for name in ("FILE_CHARACTERS", "ROW_CHARACTERS"):
            monkeypatch.setattr(module, name, 300, raising=False)


def dataset(folder: Path, name: str) -> str:
    """A long document between short ones."""
    if name == "txt":
        (folder / "text").mkdir()
        for number, text in enumerate(("short one\n", BOOK, "short two\n")):
            (folder / "text" / f"{number}.txt").write_text(text)
        return str(folder / "text")
    lines = [json.dumps({"text": text}) + "\n" for text in ("short one\n", BOOK, "short two\n")]
    (folder / "set.jsonl").write_text("".join(lines))
    return str(folder / "set.jsonl")


def expected_documents(tokenizer, fraction: float) -> dict[str, list[list[int]]]:
    """The documents of both splits: what stands between two sections of the other split is one."""
    parts = [Section("short one\n"), *split_sections([BOOK], 300), Section("short two\n")]
    held = held_out(0, len(parts), fraction)
    found: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for i, part in enumerate(parts):
        split = SPLITS[int(held[i])]
        goes_on = not part.opens and held[i] == held[i - 1]
        ends = part.closes or held[i] != held[i + 1]
        ids = tokenizer.encode(part.text)
        if goes_on:
            found[split][-1] += ids
        else:
            found[split].append([tokenizer.bos_id, *ids])
        if ends:
            found[split][-1].append(tokenizer.eos_id)
    return found


def check_stream(stream, documents: list[list[int]]) -> None:
    tokens, opens = stream.windows(np.array([0]), stream.extent.tokens - 1)
    assert tokens[0].tolist() == [token for ids in documents for token in ids]
    assert opens[0].tolist() == [i == 0 for ids in documents for i, _ in enumerate(ids)]


@pytest.mark.parametrize("name", ["txt", "jsonl"])
@pytest.mark.parametrize("batch", [1, 500, 2**20])
def test_a_long_document_is_one_but_where_it_is_held_out(
    tmp_path, tokenizer, short_sections, monkeypatch, logged, name, batch
):
    monkeypatch.setattr(sections_module, "_BATCH_CHARACTERS", batch)
    config = Corpus.Config(dataset=dataset(tmp_path, name), validation_fraction=0.2, processes=1)
    corpus = config.build(tokenizer=tokenizer)
    expected = expected_documents(tokenizer, 0.2)
    for split in SPLITS:
        check_stream(corpus.split(split), expected[split])
        assert corpus.manifest.splits[split].documents == len(expected[split])
    extents = corpus.manifest.splits
    n_sections = extents["train"].sections + extents["validation"].sections
    assert logged == [
        f"INFO: {corpus.name}: 1 long documents were tokenised in {n_sections - 2} sections, cut at blank lines where "
        "there are any, with nothing between them (section_characters)"
    ]
    assert (
        f"{len(expected['train'])} documents in {extents['train'].sections} sections cut at blank lines, "
        in corpus.describe("train")
    )
    n_bytes = sum(extent.bytes for extent in extents.values())
    assert n_bytes == len(BOOK.encode()) + 20


def test_without_validation_it_is_whole(tmp_path, tokenizer, short_sections):
    corpus = Corpus.Config(dataset=dataset(tmp_path, "jsonl"), validation_fraction=0.0).build(tokenizer=tokenizer)
    check_stream(corpus.split("train"), tokenizer.encode_documents(["short one\n", BOOK, "short two\n"]))


def test_streamed_samples_are_those_of_the_corpus(tmp_path, tokenizer, short_sections, monkeypatch):
    """On one rank, with a place that is saved at every sample."""
    data = {"dataset": dataset(tmp_path, "jsonl"), "validation_fraction": 0.2, "shuffle": False}
    live = {"tokenizer": tokenizer, "seq_len": 16, "seed": 0}
    indexed = IndexedText.Config(**data).build(**live)
    streamed = StreamedText.Config(**data).build(**live)
    for i in range(indexed.rows_per_epoch):
        state = streamed.state_dict()
        streamed = StreamedText.Config(**data).build(**live)
        streamed.load_state_dict(state)
        for left, right in zip(indexed.read(i, 1)[:4], streamed.read(i, 1)[:4], strict=True):
            assert left.tolist() == right.tolist()
    held = StreamedText.Config(**data).build(**live, split="validation")
    same = IndexedText.Config(**data).build(**live, split="validation")
    assert held.n_rows == same.n_rows
    assert held.read(0, 3).tokens_BL.tolist() == same.read(0, 3).tokens_BL.tolist()
    assert held.read(0, 3).documents_BL.tolist() == same.read(0, 3).documents_BL.tolist()


def test_ranks_of_a_stream_share_the_sections_of_a_document(tmp_path, tokenizer, short_sections):
    data = {"dataset": dataset(tmp_path, "txt"), "validation_fraction": 0.0}
    parts = ["short one\n", *(section.text for section in split_sections([BOOK], 300)), "short two\n"]
    for rank in range(2):
        loader = StreamedText.Config(**data).build(tokenizer=tokenizer, seq_len=16, seed=0, rank=rank, n_ranks=2)
        expected = [token for ids in tokenizer.encode_documents(parts[rank::2]) for token in ids]
        n = (len(expected) - 1) // 16
        assert loader.read(0, n).tokens_BL.flatten().tolist() == expected[: 16 * n]


def test_the_head_of_a_stream_ends_in_a_document(tmp_path, tokenizer, short_sections, monkeypatch):
    """What is held out ends where nothing is held out any more, and what is trained on goes on there."""
    monkeypatch.setattr(streaming, "RESERVED", 2)
    data = {"dataset": dataset(tmp_path, "jsonl"), "validation_fraction": 0.2}
    first, *others = split_sections([BOOK], 300)
    live = {"tokenizer": tokenizer, "seq_len": 16, "seed": 0}
    held = StreamedText.Config(**data).build(**live, split="validation")
    ids = tokenizer.encode_documents([first.text])[0]
    assert held.n_rows == (len(ids) - 1) // 16
    assert held.read(0, held.n_rows).tokens_BL.flatten().tolist() == ids[: 16 * held.n_rows]
    expected = tokenizer.encode_documents(["short one\n"])[0] + [tokenizer.bos_id, *tokenizer.encode(others[0].text)]
    found = StreamedText.Config(**data).build(**live).read(0, len(expected) // 16)
    assert found.tokens_BL.flatten().tolist() == expected[: len(expected) // 16 * 16]


PEAK = """
import resource, sys
from core.data.corpus import Corpus
from core.data.tokenizer import Tokenizer
tokenizer = Tokenizer.Config().build()
tokenizer.encode("text")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = Corpus.Config(dataset=sys.argv[1], cache_folder=sys.argv[2]).build(tokenizer=tokenizer)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sum(e.bytes for e in corpus.manifest.splits.values()))
"""


@pytest.mark.slow
def test_a_long_document_needs_little_more_memory_than_its_text(tmp_path):
    """A process of its own, because what one process has once used is counted for ever."""
    text = "".join(f"Sentence {i} of many, which goes on and on.\n" for i in range(200_000))
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"text": text}) + "\n").encode(), 1))
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "cache")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after, n_bytes = map(int, said.split()[-3:])
    assert n_bytes == len(text) > 8_000_000
    assert (after - before) * 1024 < 4 * len(text) + 150_000_000
