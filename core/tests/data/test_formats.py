"""Documents in files of every format and compression, as other writers wrote them, and what is said of bad ones."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config.errors import UserError
from core.config.validate import problems_of
from core.data import json_array
from core.data.bad_lines import BadLines
from core.data.corpus import Corpus
from core.data.dataset import open_source
from core.data.rows import TextField
from core.data.source import TextFiles
from core.data.text_files import read_sections

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", 'two "lines",\n\tof é日本\r\nand a 👩', " 3 ", "[4]"]
"""Documents with everything in them that a format must quote."""


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def table(texts: list[Any]) -> Any:
    return pyarrow.table({"id": list(range(len(texts))), "text": texts, "meta": [{"body": text} for text in texts]})


def as_csv(texts: list[str], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def as_parquet(texts: list[Any]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table(texts), sink, row_group_size=3)
    return sink.getvalue()


def as_arrow(texts: list[Any], new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with new(sink, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=3)
    return sink.getvalue()


WRITTEN: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    "json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False).encode(),
    "csv": lambda texts: as_csv(texts, ","),
    "tsv": lambda texts: as_csv(texts, "\t"),
    "parquet": as_parquet,
    "arrow": lambda texts: as_arrow(texts, pyarrow.ipc.new_stream),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zst,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def documents(path: Path, policy: Any = "error", field: str = "text") -> list[str]:
    return [section.text for section in read_sections(path, TextField(field), BadLines(policy))]


def said(path: Path, field: str = "text") -> str:
    with pytest.raises(UserError) as error:
        documents(path, field=field)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", WRITTEN)
def test_documents_are_those_that_were_written(tmp_path: Path, name: str, packed: str) -> None:
    if packed and name in ("parquet", "arrow"):
        return
    texts = TEXTS * 300  # more than a batch, and than a group of rows
    path = tmp_path / f"all.{name}{packed}".upper()
    path.write_bytes(PACKED[packed](WRITTEN[name](texts)))
    assert documents(path) == texts


def test_of_json_lines_in_a_json_file_each_is_one(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_bytes(b"\xef\xbb\xbf" + WRITTEN["jsonl"](TEXTS))
    assert documents(tmp_path / "all.json") == TEXTS


def test_arrow_files_are_read_as_streams_are(tmp_path: Path) -> None:
    (tmp_path / "all.arrow").write_bytes(as_arrow(TEXTS, pyarrow.ipc.new_file))
    assert documents(tmp_path / "all.arrow") == TEXTS


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_a_field_inside_of_another(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"all.{name}"
    path.write_bytes(WRITTEN[name](TEXTS))
    assert documents(path, field="meta.body") == TEXTS
    lines = tmp_path / "all.jsonl"
    lines.write_text('{"a": {"b": {"c": "deep"}}}\n{"a": {"b": {"c": "d"}}, "a.b.c": "flat"}\n{"a": {"b.c": "half"}}\n')
    assert documents(lines, field="a.b.c") == ["deep", "flat", "half"]
    lines.write_text('{"a": {"b": 1}}\n')
    assert "no field 'a.c'; there are in 'a': 'b' (choose" in said(lines, "a.c")


def test_a_folder_of_several_kinds_is_read_whole(tmp_path: Path) -> None:
    kinds = ["jsonl.gz", "jsonl.zst", "parquet", "csv.xz", "tsv.bz2", "arrow", "json"]
    for number, (name, dot, packed) in enumerate(kind.partition(".") for kind in kinds):
        path = tmp_path / f"{number}" / f"part.{name}{dot}{packed}"
        path.parent.mkdir()
        path.write_bytes(PACKED[dot + packed](WRITTEN[name]([f"of {name}{dot}{packed}", "more"])))
    for name, text in {"notes.md": "# Notes", "README.md": "no", "LICENSE": "no", "state.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "some.txt").write_text("a text")
    found = [section.text for section in open_source(str(tmp_path), "text", "error").sections()]
    assert sorted(found) == sorted([*(f"of {kind}" for kind in kinds), *["more"] * 7, "# Notes", "a text"])
    (tmp_path / "more.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 1 \.parquet\.gz, and what is read ends in \.txt, \.md, "):
        open_source(str(tmp_path), "text", "error")


@pytest.mark.parametrize("packed", [".gz", ".zst", ".xz", ".bz2"])
def test_every_frame_is_read_and_a_file_that_is_cut_off_is_named(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"all.jsonl{packed}"
    data = b"".join(PACKED[packed](WRITTEN["jsonl"]([f"{part} {n}" for n in range(500)])) for part in range(3))
    path.write_bytes(data)
    assert len(documents(path)) == 1500
    for length in (len(data) - 3, len(data) // 2, 9):
        path.write_bytes(data[:length])
        assert said(path).startswith(f"cannot read {path}: ")
    path.write_bytes(b"this is no compressed file at all")
    assert said(path).startswith(f"cannot read {path}: ")


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_tables_that_are_cut_off_or_none_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"all.{name}"
    data = WRITTEN[name](TEXTS * 100)
    for content in (data[: len(data) // 2], data[:5], b"", b"this is no table at all"):
        path.write_bytes(content)
        assert said(path).startswith(f"cannot read {path}")


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_rows_without_text_are_told_with_their_number(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"all.{name}"
    path.write_bytes(WRITTEN[name](["one", None, "three", None]))
    assert said(path).startswith(f"{path}, row 2: expected text in the field 'text', got a value of type NoneType. Fix")
    bad = BadLines("skip")
    assert [section.text for section in read_sections(path, TextField("text"), bad)] == ["one", "three"]
    assert bad.count == 2 and bad.first.startswith(f"{path}, row 2: ")
    assert said(path, "id").startswith(f"{path}, row 1: expected text in the field 'id', got a value of type int")
    assert (
        said(path, "body")
        == f"{path} has no column 'body'; there are: 'id', 'text', 'meta' (choose one with text_field)"
    )
    assert "row 1: no field 'meta.title'; there are in 'meta': 'body'" in said(path, "meta.title")


BAD_ROWS = {
    "columns": ("text,id\nok,1\na,b,c\nfine,2\n", ":3: a row of 3 columns, and the head has 2"),
    "few": ("text,id\nok,1\n\na\nfine,2\n", ":4: a row of 1 columns, and the head has 2"),
    "utf8": ("text,id\nok,1\n\udcff,3\nfine,2\n", ":3: not UTF-8"),
    "quote": ('text,id\nok,1\n"a"b,3\nfine,2\n', ":3: not a row of a table ("),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_of_csv(tmp_path: Path, fault: str) -> None:
    content, expected = BAD_ROWS[fault]
    path = tmp_path / "all.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert said(path).startswith(f"{path}{expected}")
    bad = BadLines("skip")
    assert [section.text for section in read_sections(path, TextField("text"), bad)] == ["ok", "fine"]
    assert bad.count == 1 and bad.first.startswith(f"{path}{expected}")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_tables_without_the_column_are_refused(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "all.csv"
    for content, expected in {
        "body,id\nx,1\n": "no column 'text'; there are: 'body', 'id' (choose one with text_field)",
        "text,id,text\nx,1,y\n": "two columns 'text'; there are: 'text', 'id', 'text' (choose one with text_field)",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError) as error:
            documents(path, policy)
        assert str(error.value) == f"{path} has {expected}"


def test_an_open_quote_is_told(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_text('text,id\nok,1\n"never closed,2\nmore,3\n')
    assert said(path).startswith(f"{path}:4: not a row of a table (unexpected end of data)")


BAD_ARRAYS = {
    '[{"text": "a"} {"text": "b"}]': ": no comma behind value 1 of the array",
    '[{"text": "a"}, {"text": "b"}': ": no comma behind value 2 of the array",
    '[{"text": "a"}, {"text": ': ": value 2 of the array is not JSON (",
    '[{"text": "a"}, ]': ": value 2 of the array is not JSON (",
    '[{"text": "a"}] x': " goes on behind its JSON array",
    '[{"text": "a"}, 3]': ", value 2: expected an object with the field 'text', got a value of type int. Fix",
    "[" * 5000: ": value 1 of the array is not JSON (",
}


@pytest.mark.parametrize("part_bytes", [1, 2**20])
@pytest.mark.parametrize("content", BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_bad_arrays(tmp_path: Path, content: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_PART_BYTES", part_bytes)
    path = tmp_path / "all.json"
    path.write_text(content)
    assert said(path).startswith(f"{path}{BAD_ARRAYS[content]}")


@pytest.mark.parametrize("part_bytes", [1, 7, 100])
def test_an_array_is_read_in_parts(tmp_path: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_PART_BYTES", part_bytes)
    path = tmp_path / "all.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + WRITTEN["json"](TEXTS * 3) + b"\n")
    assert documents(path) == TEXTS * 3
    path.write_text("[ ]")
    assert documents(path) == []
    path.write_bytes(b'[{"text": "\xff"}]')
    assert said(path).startswith(f"{path} is not UTF-8: ")


def test_a_format_may_be_stated(tmp_path: Path) -> None:
    (tmp_path / "all.data").write_bytes(WRITTEN["csv"](TEXTS))
    source = TextFiles.Config(path=str(tmp_path), format="csv").build()
    assert [section.text for section in source.sections()] == TEXTS
    with pytest.raises(UserError, match=r"1 \.data, and what is read ends in"):
        open_source(str(tmp_path), "text", "error")
    assert problems_of(Corpus.Config(format="csv")) == [
        ("format", "format csv is of files, and dataset names none: leave it out")
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_a_missing_package_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    wanted = f"{tmp_path / name} needs the package pyarrow: in the checkout run pip install './core[data]'"
    assert said(tmp_path / name) == wanted


def test_long_fields_are_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    limit, texts = csv.field_size_limit(), ["a" * 200_000, "b"]
    (tmp_path / "a.csv").write_bytes(as_csv(texts, ","))
    assert documents(tmp_path / "a.csv") == texts
    assert csv.field_size_limit() == limit < len(texts[0])
