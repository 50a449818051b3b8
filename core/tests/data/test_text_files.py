import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from core.config.errors import UserError
from core.data import sections, text_files
from core.data.bad_lines import BadLines
from core.data.dataset import open_source
from core.data.rows import TextField
from core.data.sections import Section
from core.data.source import StandardLibrary
from core.data.text_files import find_files, read_sections


def documents(path: Path, policy="error", field="text") -> list[str]:
    """The documents of a file, none of which is long."""
    sections = list(read_sections(path, TextField(field), BadLines(policy)))
    assert all(section.opens and section.closes for section in sections)
    return [section.text for section in sections]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_text_file_is_one_document_exactly_as_it_is(tmp_path, name):
    text = "\nA line.\r\n\r\n  Another,\ta \u2028 third: é日本\nno line end"
    assert documents(write(tmp_path / name, text)) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_json_line_is_a_document(tmp_path, name):
    texts = ["one", "two\nlines", "é \u2028 \x85 日本 👩", ""]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    assert documents(write(tmp_path / name, "\r\n\n".join(lines))) == texts
    assert documents(write(tmp_path / name, '{"body": "x"}\n'), field="body") == ["x"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "text"), ("a.jsonl", '{"text": "text"}')])
def test_byte_order_mark_is_no_text(tmp_path, name, content):
    assert documents(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())) == ["text"]


BAD_LINES = [
    (b'{"text": "cut off', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["text"]', "expected an object with the field 'text', got a value of type list"),
    (b'{"body": "x", "id": 1}', "no field 'text'; there are: 'body', 'id' .*text_field"),
    (b"{}", "no field 'text'; there are: none"),
    (b'{"text": 3}', "expected text in the field 'text', got a value of type int"),
    (b'{"text": null}', "expected text in the field 'text', got a value of type NoneType"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "the field 'text' holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_unreadable_json_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {reason}.*on_bad_line skip"):
        documents(path)
    bad = BadLines("skip")
    assert [section.text for section in read_sections(path, TextField("text"), bad)] == ["before", "after"]
    assert bad.count == 1 and bad.first.startswith(f"{path}:3: ")


def test_json_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LINE_BYTES", 100)
    fits = json.dumps({"text": "x" * 87})
    path = write(tmp_path / "a.jsonl", fits + "\n" + json.dumps({"text": "x" * 1000}) + "\n" + '{"text": "after"}')
    assert len(fits) == 99
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is longer than 100 bytes"):
        documents(path)
    assert documents(path, "skip") == ["x" * 87, "after"]


def test_bad_utf8_in_text(tmp_path):
    path = write(tmp_path / "a.txt", b"one\nt\xffwo\nthree \xc3")
    with pytest.raises(UserError, match=r"a\.txt:2: not UTF-8 \(invalid start byte\)"):
        documents(path)
    bad = BadLines("skip")
    assert [section.text for section in read_sections(path, TextField("text"), bad)] == ["one\nthree "]
    assert bad.count == 2


def test_character_across_two_parts_of_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_PART_BYTES", 7)
    text = "日本語のとても長い行 👩👩👩 " * 20
    assert documents(write(tmp_path / "a.txt", text)) == [text]
    with pytest.raises(UserError, match=r"a\.txt:2: not UTF-8"):
        documents(write(tmp_path / "a.txt", ("é" * 50 + "\n" + "é" * 50).encode() + b"\xff\xff"))
    assert documents(write(tmp_path / "a.txt", b"aaaaaa\xc3" + b"\xffbbb\nnext"), "skip") == ["aaaaaanext"]


def test_the_length_of_sections_is_a_setting(tmp_path):
    text = "".join(f"x = {i}\n\n" for i in range(1000))
    write(tmp_path / "a.txt", text)
    write(tmp_path / "b.jsonl", json.dumps({"text": text}))
    write(tmp_path / "library/c.py", text)
    library = StandardLibrary.Config(root=str(tmp_path / "library"), section_characters=2000)
    for source in (
        open_source(str(tmp_path / "a.txt"), "text", "error", section_characters=2000),
        open_source([str(tmp_path / "b.jsonl")], "text", "error", section_characters=2000),
        library.build(),
    ):
        found = [section.text for section in source.sections()]
        if source.name == "stdlib":
            del found[next(i for i in range(len(found)) if "".join(found[: i + 1]) == text) + 1 :]  # topics of help()
        assert "".join(found) == text and all(1000 <= len(each) <= 2000 for each in found[:-1]) and len(found) > 4


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_long_document_comes_in_sections(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "FILE_CHARACTERS", 100)
    monkeypatch.setattr(sections, "ROW_CHARACTERS", 100)
    monkeypatch.setattr(sections, "_PART_CHARACTERS", 30)
    monkeypatch.setattr(text_files, "_PART_BYTES", 30)
    text = "".join(f"paragraph {i}\nwith two lines\n\n" for i in range(40))
    rows = [text, "short"] if "jsonl" in name else [text]
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows) if "jsonl" in name else text
    found = list(read_sections(write(tmp_path / name, content), TextField("text"), BadLines("error")))
    if "jsonl" in name:
        assert found.pop() == Section("short")
    assert "".join(section.text for section in found) == text and len(found) > 10
    assert [section.opens for section in found] == [i == 0 for i in range(len(found))]
    assert [section.closes for section in found] == [i == len(found) - 1 for i in range(len(found))]
    assert all(section.text.startswith("paragraph") and section.text.endswith("\n\n") for section in found)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_file_larger_than_memory_is_read_in_bounded_memory(tmp_path, name):
    line = json.dumps({"text": "word " * 200}) + "\n"
    path = write(tmp_path / name, line * 12_000)
    tracemalloc.start()
    try:
        size = sum(len(section.text) for section in read_sections(path, TextField("text"), BadLines("error")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size >= 12_000_000
    assert peak < 2_000_000


def test_damaged_archive(tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"text " * 10_000)
    for content in (whole[:-20], b"no archive", whole[:30] + b"\0\0\0" + whole[33:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*a\.txt\.gz"):
            documents(path, "skip")


def test_folder_is_searched_in_depth_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/y.txt.gz", "c/d/e.jsonl.gz", "README.md", ".hidden.txt", ".git/x.txt"):
        write(tmp_path / name, "{}")
    (tmp_path / "folder.txt").mkdir()
    found = [file.relative_to(tmp_path).as_posix() for file in find_files(str(tmp_path))]
    assert found == ["a/y.txt.gz", "a/z.jsonl", "b.txt", "c/d/e.jsonl.gz"]


def test_no_file_of_a_folder_is_passed_over_in_silence(tmp_path):
    """Shards in three forms, of which one can be read: a third of the text would be trained on."""
    about = [
        "README",
        "readme.txt.md",
        "LICENSE.txt.html",
        "SHA256SUMS",
        "a.txt.sha256",
        "_SUCCESS",
        "dataset_info.json",
    ]
    for name in ("a.jsonl.gz", *about, ".cache/b.parquet", "sub/.DS_Store"):
        write(tmp_path / name, "{}")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl.gz"]
    for name in ("b.jsonl.LZ4", "sub/c.jsonl.lz4", "c.parquet.gz", "d.tar.gz", "e", "f.v2.feather"):
        write(tmp_path / name, "")
    with pytest.raises(UserError) as caught:
        find_files(str(tmp_path))
    kinds = "2 .jsonl.lz4, 1 .parquet.gz, 1 .tar.gz, 1 without a suffix, 1 .feather"
    assert str(caught.value).startswith(f"the folder {tmp_path} holds {kinds}, and what is read ends in .txt, ")
    assert f"by a pattern such as '{tmp_path}/**/*.jsonl'" in str(caught.value)
    assert [file.name for file in find_files(f"{tmp_path}/**/*.jsonl.gz")] == ["a.jsonl.gz"]


def test_a_link_to_nothing_is_no_text(tmp_path):
    write(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="b.txt is a link to nothing"):
        find_files(str(tmp_path))


def test_glob_and_literal_names(tmp_path):
    for name in ("a1.txt", "a2.txt", "b.txt", "deep/a3.txt", "[1].txt"):
        write(tmp_path / name, "x")

    def names(pattern):
        return [file.name for file in find_files(str(tmp_path / pattern))]

    assert names("a*.txt") == ["a1.txt", "a2.txt"]
    assert names("**/a*.txt") == ["a1.txt", "a2.txt", "a3.txt"]
    assert names("[1].txt") == ["[1].txt"]


def test_the_name_tells_what_a_link_holds(tmp_path):
    blob = write(tmp_path / "blobs" / "5f3a", gzip.compress(b'{"text": "one"}\n'))
    for link in ("a.jsonl.gz", "folder/a.jsonl.gz"):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(blob)
    for dataset in ("a.jsonl.gz", "a.*", "folder"):
        [file] = find_files(str(tmp_path / dataset))
        assert documents(file) == ["one"]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "x")
    assert find_files("~/a.txt") == find_files("~/*.txt") == [tmp_path / "a.txt"]


def test_files_that_are_not_there(tmp_path):
    write(tmp_path / "only" / "a.feather", "x")
    with pytest.raises(UserError, match="there is no .*none.txt: give stdlib, a file"):
        find_files(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"no file matches .*none\*"):
        find_files(str(tmp_path / "none*"))
    with pytest.raises(UserError, match="only holds 1 .feather, and what is read ends in .txt, .md, .jsonl"):
        find_files(str(tmp_path / "only"))
    write(tmp_path / "about" / "README", "x")
    with pytest.raises(UserError, match="about holds no file to read, and what is read ends in .txt, .md, .jsonl"):
        find_files(str(tmp_path / "about"))
    for dataset in ("only/a.feather", "only/*"):
        with pytest.raises(UserError, match=r"cannot tell what .*a\.feather holds: its name must end in \.txt"):
            find_files(str(tmp_path / dataset))
