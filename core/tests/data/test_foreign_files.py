"""Files that somebody else wrote, damaged in every way: they are read as they are, or named in one line."""

import copy
import functools
import gzip
import importlib.resources
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.config.errors import UserError
from core.data.bad_lines import BadLines
from core.data.corpus import Corpus
from core.data.dataset import open_source
from core.data.library import library_errors
from core.data.rows import TextField
from core.data.source import HubDataset, TextFiles
from core.data.text_files import read_sections
from core.data.tokenizer import Tokenizer
from core.data.train_tokenizer import TokenizerTraining

VALUES = [
    None, True, 0, -1, 1.5, 2**31, 2**33, 10**40, float("nan"), "", "x", "\0", "<bos>", "\ud800", "\udc00\ud800", [],
    {}, [None], {"a": 1}, [[1]], {"content": 3}, {"content": "<eos>"}, "long" * 1000,
]  # fmt: skip
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}"]
NO_OBJECT = [b"", b"{}", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"9" * 5000, b"\0" * 99, b"NaN"]


def one_line(error: UserError) -> bool:
    """Whether a message is one that a user can read."""
    return "\n" not in str(error) and len(str(error)) < 2000


def flipped(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few others among them, or a part of them."""
    changed = bytearray(data)
    match draw.randrange(4):
        case 0:
            for _ in range(draw.randrange(1, 5)):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        case 1:
            del changed[draw.randrange(len(changed)) :]
        case 2:
            first = draw.randrange(len(changed))
            changed[first : first + draw.randrange(200)] = draw.randbytes(draw.randrange(200))
        case _:
            first = draw.randrange(len(changed))
            changed[first : first + draw.randrange(50)] = draw.choice([*NO_OBJECT, b"\n", b'"', b"\\ud800", b"\r\n\r"])
    return bytes(changed)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where something stands in data of JSON; of long lists and tables the beginning."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items)[:6]:
        yield from places(part, (*path, key))


def retyped(value: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The data with one or two things gone, or of another type."""
    value = copy.deepcopy(value)
    for _ in range(draw.randrange(1, 3)):
        *above, key = draw.choice(list(places(value))[1:])
        holder = functools.reduce(lambda part, step: part[step], above, value)
        if draw.random() < 0.25:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return value


# Text


def lines(draw: random.Random) -> bytes:
    """Lines of JSON, some of which are none."""
    rows: list[bytes] = []
    for number in range(draw.randrange(1, 12)):
        letter = draw.choice(["é", "日本", "\u2028", "👩", "a\0b", "\\", '"'])
        row: Any = {"id": number, "text": f"text {number} {letter}"}
        kind = draw.randrange(10)
        if kind == 0:
            row = retyped({"text": row["text"], "meta": {"a": [1, {"b": None}]}}, draw)
        encoded = json.dumps(row, ensure_ascii=kind % 2 == 0).encode(errors="surrogatepass")
        if kind == 1:
            encoded = flipped(encoded, draw)
        elif kind == 2:
            encoded = draw.choice([*NO_OBJECT, *DEEP])
        rows.append(encoded)
    return draw.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(rows) + draw.choice([b"", b"\n"])


def readable(data: bytes) -> list[str]:
    """The texts of the lines that are right, found one by one."""
    texts = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            text = json.loads(line.decode())["text"]
            text.encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
        texts += [text] if isinstance(text, str) and text.strip() else []
    return texts


def check_text(path: Path, draw: random.Random, tokenizer: Tokenizer) -> None:
    """One text file, damaged: what is read is text, and of lines all that are right."""
    jsonl = ".jsonl" in path.name
    plain = "Some text.\n\nAnd some more, é 日本.\n".encode() * draw.randrange(1, 9)
    data = lines(draw) if jsonl else flipped(plain, draw)
    packed = gzip.compress(data) if path.suffix == ".gz" else data
    damaged = path.suffix == ".gz" and draw.random() < 0.5
    path.write_bytes(flipped(packed, draw) if damaged else packed)
    for policy in ("error", "skip"):
        try:
            found = [section.text for section in open_source(str(path), "text", policy).sections()]
        except UserError as error:
            assert one_line(error) and path.name in str(error), error
            assert policy == "error" or damaged or "yields no text" in str(error)
            if "yields no text" in str(error) and not damaged and jsonl:
                assert readable(data) == []
            continue
        assert all(0 <= token < tokenizer.vocab_size for ids in tokenizer.encode_batch(found) for token in ids)
        if jsonl and not damaged:
            assert found == readable(data)


# Tokenizers


def save(path: Path, draw: random.Random, tokenizer_json: dict, settings: dict) -> None:
    """A folder of Hugging Face with one file that is not as it should be."""
    files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": settings}
    contents = {name: json.dumps(value).encode() for name, value in files.items()}
    name = draw.choice(list(files))
    match draw.randrange(3):
        case 0:
            contents[name] = json.dumps(retyped(files[name], draw)).encode()
        case 1:
            contents[name] = flipped(contents[name], draw)
        case _:
            contents[name] = draw.choice([*NO_OBJECT, *DEEP])
    for each, content in contents.items():
        (path / each).write_bytes(content)


@functools.cache
def published() -> list[dict]:
    """One tokenizer.json of each kind."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    models, before = tokenizers.models, tokenizers.pre_tokenizers
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    words = {word: i for i, word in enumerate("<bos> <eos> some text to read [UNK] a b ab é _".split())}
    kinds = [
        (models.BPE(words, [("a", "b")], unk_token="[UNK]", fuse_unk=True), before.ByteLevel(add_prefix_space=True)),
        (models.WordLevel(words, unk_token="[UNK]"), before.Whitespace()),
        (models.WordPiece({**words, "##x": 40}, unk_token="[UNK]"), before.BertPreTokenizer()),
        (models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=6), before.Metaspace()),
    ]
    found = []
    for model, splitter in kinds:
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = splitter
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "_")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_special_tokens(["<bos>", "<eos>"])
        tokenizer.add_tokens([tokenizers.AddedToken("zz", lstrip=True, single_word=True)])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
        found.append(json.loads(tokenizer.to_str()))
    return found


SETTINGS = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>", "model_max_length": 10**30}


def check_tokenizer(path: Path) -> bool:
    """Whether there is a tokenizer; if so, it encodes within its vocabulary."""
    try:
        tokenizer = Tokenizer.Config(path=str(path)).build()
        found = tokenizer.encode_documents(["some text to read\n", "é 日本 \u2581", ""])
        tokenizer.decode([token for ids in found for token in ids])
    except UserError as error:
        assert one_line(error) and path.name in str(error), error
        return False
    assert all(0 <= token < tokenizer.vocab_size for ids in found for token in ids)
    return True


def check_folder(path: Path, draw: random.Random, tokenizer: Tokenizer) -> None:
    save(path, draw, draw.choice(published()), SETTINGS)
    check_tokenizer(path)


def check_sentencepiece(path: Path, draw: random.Random, tokenizer: Tokenizer) -> None:
    content = (importlib.resources.files("core.data") / "tokenizer.model").read_bytes()
    tail = content[:-300] + flipped(content[-300:], draw)
    path.write_bytes(draw.choice([flipped(content, draw), tail, tail, draw.randbytes(300)]))
    check_tokenizer(path)


# Sets of Hugging Face


def check_dataset(path: Path, draw: random.Random, tokenizer: Tokenizer) -> None:
    pytest.importorskip("datasets", reason="the hf extra is not installed")
    import pyarrow
    import pyarrow.parquet

    kind = draw.choice(["parquet", "json", "csv", "arrow"])
    file = path / f"train.{kind}"
    for other in path.iterdir():
        other.unlink()
    rows = [{"text": f"row {i}", "n": i} for i in range(5)]
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table)
    elif kind == "json":
        file.write_bytes(lines(draw))
    else:
        file.write_text("text,n\n" + "".join(f"row {i},{i}\n" for i in range(5)))
    file.write_bytes(flipped(file.read_bytes(), draw))
    try:
        found = [
            section.text for section in HubDataset.Config(dataset=str(path), on_bad_line="skip").build().sections()
        ]
    except UserError as error:
        assert one_line(error) and str(path) in str(error), error
        return
    tokenizer.encode_batch(found)


CHECKS = [
    pytest.param("a.jsonl", check_text, 800, id="a.jsonl"),
    pytest.param("a.jsonl.gz", check_text, 500, id="a.jsonl.gz"),
    pytest.param("a.txt", check_text, 200, id="a.txt"),
    pytest.param("a.txt.gz", check_text, 200, id="a.txt.gz"),
    pytest.param("folder", check_folder, 900, id="folder"),
    pytest.param("mine.model", check_sentencepiece, 400, id="mine.model"),
    pytest.param("set", check_dataset, 60, marks=pytest.mark.slow, id="set"),
]


def damage(check, path: Path, tokenizer: Tokenizer, seeds: range) -> None:
    if not path.suffix:
        path.mkdir()
    for seed in seeds:
        try:
            check(path, random.Random(f"{path.name} {seed}"), tokenizer)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize(("name", "check", "n_times"), CHECKS)
def test_what_is_damaged_is_read_or_named(tmp_path, tokenizer, name, check, n_times):
    damage(check, tmp_path / name, tokenizer, range(n_times // 20))


@pytest.mark.faults
@pytest.mark.parametrize(("name", "check", "n_times"), CHECKS)
def test_three_thousand_damaged_files_are_read_or_named(tmp_path, tokenizer, name, check, n_times):
    damage(check, tmp_path / name, tokenizer, range(1000, 1000 + n_times))


# Places


def told(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    assert one_line(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["none.txt", "no/where.jsonl", "a\0b.txt", "x" * 300 + ".txt", "~nobody-here/a.txt", "", "*", "\ud800.txt"]
)
def test_a_text_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert told(lambda: open_source(name, "text", "error"))


@pytest.mark.parametrize("name", ["none.model", "a\0b.model", "x" * 300 + ".json", "~nobody-here/a.model", "none"])
def test_a_tokenizer_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "there is no tokenizer " in told(lambda: Tokenizer.Config(path=name).build())


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name in ("a.txt", "a.model", "tokenizer.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("a.txt", "zero.jsonl"):
        assert "no regular file" in told(lambda name=name: open_source(str(tmp_path / name), "text", "error"))
    for name in ("a.model", ""):
        assert "no regular file" in told(lambda name=name: Tokenizer.Config(path=str(tmp_path / name)).build())


def test_a_folder_is_read_through_links_and_once(tmp_path):
    for name in ("data/a", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.txt").write_text(f"text of {name}")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "data/a")
    texts = [section.text for section in open_source(str(tmp_path / "data"), "text", "error").sections()]
    assert texts == ["text of data/a", "text of elsewhere/deep"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("some text")
    scan = os.scandir

    def forbid(path: str) -> Any:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)
    assert "Permission denied" in told(lambda: open_source(str(tmp_path), "text", "error"))


def test_a_name_that_is_not_unicode(tmp_path, tokenizer):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("some text")
    corpus = Corpus.Config(dataset=str(path), validation_fraction=0.0).build(tokenizer=tokenizer)
    assert corpus.manifest.splits["train"].documents == 1
    path.write_bytes(b"\xff")
    assert "not UTF-8" in told(lambda: list(read_sections(path, TextField("text"), BadLines("error"))))


@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_text_that_changes_while_it_is_read(tmp_path, when):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("some text")
    sections = TextFiles.Config(path=str(tmp_path)).build().sections()
    next(sections)
    (tmp_path / ("2.txt" if when == "between" else "1.txt")).write_text("some more text")
    name = "2.txt" if when == "between" else "1.txt"
    assert told(lambda: list(sections)) == (
        f"{tmp_path / name} has changed since the run began to read: start again once nothing writes there"
    )
    (tmp_path / "1.txt").unlink()
    assert "1.txt" in told(lambda: list(TextFiles.Config(path=str(tmp_path / "1.txt")).build().sections()))


def test_a_text_that_goes_while_it_is_read(tmp_path):
    (tmp_path / "1.txt").write_text("some text")
    source = TextFiles.Config(path=str(tmp_path / "1.txt")).build()
    (tmp_path / "1.txt").unlink()
    assert "cannot read" in told(lambda: list(source.sections()))


def test_a_row_of_many_fields_is_named_by_some(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"field {i}" * 50: 1 for i in range(5000)}))
    assert "and 4980 more" in told(lambda: list(read_sections(path, TextField("text"), BadLines("error"))))


class Panic(BaseException):
    """As tokenizers' panics are: no Exception."""


@pytest.mark.parametrize("error", [Panic("called `unwrap()`\n on  a `None`"), KeyError("x"), ZeroDivisionError()])
def test_whatever_a_library_raises_is_one_line(error):
    said = {"Panic": "it fails: called `unwrap()` on a `None`", "KeyError": "it fails: 'x'"}
    with pytest.raises(UserError) as told, library_errors("it fails"):
        raise error
    assert str(told.value) == said.get(type(error).__name__, "it fails: ZeroDivisionError")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("mine"), SystemExit(3)])
def test_what_is_no_fault_of_a_library_passes(error):
    with pytest.raises(type(error)) as told, library_errors("it fails"):
        raise error
    assert told.value is error


def test_a_tokenizer_that_fails_on_a_text_is_named(tokenizer, monkeypatch):
    def fail(texts: list[str]) -> list[list[int]]:
        raise Panic("no such token")

    monkeypatch.setattr(tokenizer._model, "encode_batch", fail)
    for encode in (tokenizer.encode, tokenizer.encode_documents):
        assert told(lambda encode=encode: encode("x")) == "the tokenizer bundled cannot encode a text: no such token"


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    (tmp_path / "a.txt").write_text("some words and more words\n" * 50)
    config = TokenizerTraining.Config(dataset=str(tmp_path / "a.txt"), vocab_size=300, output=str(tmp_path / "a.model"))
    training = config.build()
    monkeypatch.setattr(TokenizerTraining, "_train", lambda self: b"x" * 100)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in told(training.run)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
