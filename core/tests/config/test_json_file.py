"""JSON of others: what is read, and what is one line that names the file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from core.config.errors import UserError
from core.config.json_file import DEEPEST, parse_json, read_json, typed


def nested(depth: int) -> str:
    """An object that is `depth` deep."""
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": [1, 2.5, null, true, "\xc3\xa9"], "b": {}}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": 1000000000000000019884624838656, "b": "\\ud83d\\ude00", "c": "\\\\ud800"}',
        nested(DEEPEST).encode(),
    ],
)
def test_json_is_read_as_python_reads_it(tmp_path: Path, data: bytes):
    file = tmp_path / "a.json"
    file.write_bytes(data)
    assert read_json(file) == parse_json(data, "it") == json.loads(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1"),
        (b'{"a": 1', "is not JSON: Expecting ',' delimiter"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7 is 0xff"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8: byte 0 is 0xff"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice in one JSON object"),
        (b'{"a": ' + b"7" * 5000 + b"}", "a number has 5,000 digits, at most 100 are allowed: 777777777..."),
        (nested(DEEPEST + 1).encode(), f"is nested more than {DEEPEST} deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", f"is nested more than {DEEPEST} deep"),
        (b'{"a": ' + b'{"a":' * 100_000, f"is nested more than {DEEPEST} deep"),
        (rb'{"a": {"b": ["\ud800"]}}', "has half a character"),
        (rb'{"a": {"\udc00": 1}}', "has half a character"),
        (b"[1]", "is no JSON object"),
        (b"null", "is no JSON object"),
    ],
)
def test_anything_else_is_one_line_that_names_the_file(tmp_path: Path, data: bytes, message: str):
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(file)
    text = str(caught.value)
    assert text.startswith(str(file)) and message in text and "\n" not in text


def test_a_file_may_not_be_too_large(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": 1}'.ljust(2**20))
    assert read_json(file, most_mib=1) == {"a": 1}
    file.write_bytes(b'{"a": 1}'.ljust(2**20 + 1))
    with pytest.raises(UserError, match="a.json has more than 1 MiB"):
        read_json(file, most_mib=1)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is no regular file"), (".", "is no regular file"), ("none", "No such file")):
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name)


def test_types():
    assert typed({"a": [1]}, dict[str, list[int]], "x") == {"a": [1]}
    assert typed({"a": {"b": [object]}}, dict[str, dict[str, Any]], "x")
    with pytest.raises(UserError) as caught:
        typed({"a": [1, "2"], "b": 3}, dict[str, list[int]], "x.json")
    assert str(caught.value) == "x.json: a.1: expected int, got '2'\nx.json: b: expected list[int], got 3"
    with pytest.raises(UserError, match=r"^x.json: expected dict\[str, int\], got \[\]$"):
        typed([], dict[str, int], "x.json")
    with pytest.raises(UserError, match="and 2 more"):
        typed(["x"] * 12, list[int], "x.json")
