"""How parts that several processes read and tokenise come to their turn, with threads in place of processes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from core.config.errors import UserError
from core.data import merge
from core.data.bad_lines import BadLines
from core.data.merge import PartEnd, Reader, Tokens
from core.data.parts import SourcePart
from core.data.sections import Section

N = 2


class Letters(SourcePart):
    """So many documents of one letter each, of which some are large enough for a batch of their own."""

    travels = True

    def __init__(self, letter: str, n: int, wait_for: Event | None = None) -> None:
        self.letter, self.n, self.wait_for = letter, n, wait_for

    @property
    def place(self) -> str:
        return self.letter

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        for number in range(self.n):
            if self.wait_for is not None and number:
                assert self.wait_for.wait(60)
            yield Section(self.letter * 2**20)


class First:
    """A tokenizer that says when it has seen a letter."""

    vocab_size, fingerprint = 128, "first"

    def __init__(self) -> None:
        self.seen = {letter: Event() for letter in "abcdef"}

    def encode_sections(self, sections: Sequence[Section]) -> list[list[int]]:
        for section in sections:
            self.seen[section.text[0]].set()
        return [[ord(section.text[0])] for section in sections]


class Here:
    """A worker in the thread that asks it."""

    def __init__(self, work: Any) -> None:
        self.answers = work.answers

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The files that tokens were put into."""
    made: list[Any] = []

    class Kept(merge._File):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            made.append(self)

    monkeypatch.setattr(merge, "Worker", Here)
    monkeypatch.setattr(merge, "_File", Kept)
    return made


def letters(items: Iterator[merge.MergeItem]) -> str:
    """The letters of all documents, and a full stop at the end of each part."""
    return "".join(
        "." if isinstance(item, PartEnd) else "".join(chr(ids[0]) for ids in item.encoded.documents()) for item in items
    )


def test_later_parts_are_read_ahead_while_an_earlier_one_is_slow(files: list[Any], tmp_path: Path) -> None:
    encoder = First()
    parts = [Letters("a", 2, encoder.seen["c"]), Letters("b", 3), Letters("c", 1), Letters("d", 9)]
    assert letters(Reader(parts, "error", encoder, tmp_path).items(0, 0, N)) == "aa.bbb.c.ddddddddd."
    assert len(files) >= 2 and all(file._file.closed for file in files) and list(tmp_path.iterdir()) == []


def test_no_more_is_kept_in_memory_than_waits_for_each_process(
    files: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, put = [], merge._Merge._put

    def counted(self: Any, *item: Any) -> None:
        put(self, *item)
        kept.append(self.kept)

    monkeypatch.setattr(merge._Merge, "_put", counted)
    parts = [Letters("a", 40), Letters("b", 40)]
    assert letters(Reader(parts, "error", First(), tmp_path).items(0, 3, N)) == "a" * 37 + "." + "b" * 40 + "."
    assert max(kept) <= merge._AHEAD * N + 2 * N


def test_many_parts_without_text_are_no_reason_to_wait(files: list[Any], tmp_path: Path) -> None:
    parts = [Letters("a", 3), *(Letters("b", 0) for _ in range(50)), Letters("c", 3)]
    assert letters(Reader(parts, "error", First(), tmp_path).items(0, 0, N)) == f"aaa{'.' * 51}ccc."


class Broken(Letters):
    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        yield from super().sections_of(bad)
        bad.add(self.letter, "it breaks off")


def test_a_mistake_is_told_when_its_turn_has_come(files: list[Any], tmp_path: Path) -> None:
    parts, found = [Letters("a", 4), Broken("b", 2), Letters("c", 3)], []
    with pytest.raises(UserError, match="^b: it breaks off"):
        for item in Reader(parts, "error", First(), tmp_path).items(0, 0, N):
            found.append(item)
    assert letters(iter(found)) == "aaaa.bb" and all(file._file.closed for file in files)
    assert all(isinstance(item, Tokens | PartEnd) for item in found)


class Home(Letters):
    travels = False


def test_a_place_that_takes_no_files_is_told_when_its_turn_has_come(files: list[Any], tmp_path: Path) -> None:
    words = First()
    parts = [Letters("a", 2, wait_for=words.seen["c"]), Letters("b", 1), Letters("c", 1)]
    found = Reader(parts, "error", words, tmp_path / "gone").items(0, 0, N)
    assert letters(next(found) for _ in range(3)) == "aa."
    with pytest.raises(FileNotFoundError, match="gone"):
        next(found)


def test_what_this_process_must_read_comes_between(files: list[Any], tmp_path: Path) -> None:
    parts = [Home("a", 7), Letters("b", 3), Home("c", 7), Letters("d", 2)]
    reader = Reader(parts, "error", First(), tmp_path)
    for processes in (1, N, 5, None):
        assert letters(reader.items(0, 2, processes)) == "aaaaa.bbb.ccccccc.dd."
