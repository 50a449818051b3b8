"""metrics.jsonl, whatever became of it."""

import json
import random
from pathlib import Path

import pytest

from core.runtime.records import read_records
from core.train import records
from core.train.metrics import Record, last_record
from core.train.records import carry_on

FULL = {name: 1.5 for name in Record.__dataclass_fields__ if name != "numbers"}
FOREIGN = {
    "torn": b'{"step": 1',
    "torn in the middle": b'{"st{"step": 3, "loss": 1.0}',
    "zeros, as some file systems leave them": b"\0" * 40,
    "no UTF-8": b'{"step": 3, "name": "\xff"}',
    "nested": b"[" * 100_000,
    "a list": b"[3]",
    "a number": b"3",
    "another object": b'{"epoch": 3}',
    "a step that is no number": b'{"step": "3"}',
    "a step that is half": b'{"step": 3.0}',
    "a truth": b'{"step": true}',
    "a number without end": b'{"step": ' + b"3" * 5_000 + b"}",
    "blanks": b"   ",
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, *lines: bytes | int) -> None:
    data = [line if isinstance(line, bytes) else json.dumps({"step": line}).encode() for line in lines]
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in data))


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_bytes().split(b"\n") if line]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings."""
    lines: list[str] = []
    monkeypatch.setattr(records.log, "warning", lines.append)
    return lines


def test_records_after_the_step_that_a_run_goes_on_from_are_put_aside(tmp_path, said):
    write(tmp_path, 1, 10, 20)
    carry_on(tmp_path, 20)
    assert names(tmp_path) == ["metrics.jsonl"] and steps(tmp_path) == [1, 10, 20]
    carry_on(tmp_path, 15)
    assert steps(tmp_path) == [1, 10] and steps(tmp_path, "metrics.attempt-0.jsonl") == [1, 10, 20]
    assert not said
    (tmp_path / "metrics.attempt-0.jsonl").rename(tmp_path / "metrics.attempt-1.jsonl")
    for _ in range(2):
        write(tmp_path, 1, 10, 30)
        carry_on(tmp_path, 15)
    assert steps(tmp_path, "metrics.attempt-1.jsonl") == [1, 10, 20]
    assert steps(tmp_path, "metrics.attempt-0.jsonl") == steps(tmp_path, "metrics.attempt-2.jsonl") == [1, 10, 30]


def test_a_record_that_lost_its_line_end_is_a_record(tmp_path, said):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\n{"step": 2}')
    carry_on(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert names(tmp_path) == ["metrics.jsonl"] and not said


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_no_record_is_set_aside(tmp_path, said, name, place):
    lines: list[bytes | int] = [1, 2]
    lines.insert(place, FOREIGN[name])
    write(tmp_path, *lines)
    carry_on(tmp_path, 2)
    assert steps(tmp_path) == [1, 2] and [record["step"] for record in read_records(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.set-aside.jsonl").read_bytes() == FOREIGN[name] + b"\n"
    file = tmp_path / "metrics.jsonl"
    assert said == [f"{file}: 1 of 3 lines are no records, and are now in metrics.set-aside.jsonl"]
    carry_on(tmp_path, 2)
    assert len(said) == 1 and names(tmp_path) == ["metrics.jsonl", "metrics.set-aside.jsonl"]


def test_lines_are_set_aside_behind_those_of_earlier_attempts(tmp_path):
    for line in (b"first", b"second"):
        write(tmp_path, 1, line, 5)
        carry_on(tmp_path, 3)
    assert (tmp_path / "metrics.set-aside.jsonl").read_bytes() == b"first\nsecond\n"
    assert b"first" in (tmp_path / "metrics.attempt-0.jsonl").read_bytes() and steps(tmp_path) == [1]


def test_no_damage_keeps_a_run_from_going_on(tmp_path):
    """Cut, changed, and mixed with other lines, at random: what is left are records up to the step, and no byte is
    lost."""
    draw = random.Random(0)
    for _ in range(200):
        folder = tmp_path / "run"
        folder.mkdir()
        write(folder, *range(1, 9))
        file = folder / "metrics.jsonl"
        data = bytearray(file.read_bytes())
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    del data[at:]
                case 1:
                    data[at] = draw.randrange(256)
                case 2:
                    data[at:at] = draw.choice(list(FOREIGN.values()))[:50]
                case 3:
                    del data[at : at + draw.randint(1, 20)]
            data = data or bytearray(b"\n")
        file.write_bytes(data)
        carry_on(folder, 5)
        kept = steps(folder)
        assert all(step <= 5 for step in kept) and file.read_bytes().count(b"\n") == len(kept)
        everything = b"\n".join(path.read_bytes() for path in folder.iterdir()).split(b"\n")
        assert set(bytes(data).split(b"\n")) <= {*everything, b""}
        carry_on(folder, 5)
        assert steps(folder) == kept
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_kill_between_two_writes_loses_no_record(tmp_path, monkeypatch):
    """The file of an attempt, that of the lines set aside, and the records, in this order; each is there whole."""
    replace, written, allowed = records.replace_file, [], 0

    def stop_before(path: Path, data: bytes) -> None:
        if len(written) == allowed:
            raise KeyboardInterrupt
        written.append(path.name)
        replace(path, data)

    monkeypatch.setattr(records, "replace_file", stop_before)
    for number in range(3):
        allowed = number
        write(tmp_path, 1, b"foreign", 5)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            carry_on(tmp_path, 3)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert written == ["metrics.attempt-1.jsonl", "metrics.set-aside.jsonl"]


def test_the_last_record_is_found_behind_damage(tmp_path):
    assert last_record(tmp_path) is None
    lines = [json.dumps({**FULL, "step": step, "moe/dead_experts": 2.0}).encode() for step in (1, 2)]
    write(tmp_path, *lines, b'{"step": 3}', b'{"step": 4, "lo')
    record = last_record(tmp_path)
    assert record is not None and (record.step, record.numbers) == (2, {"moe/dead_experts": 2.0})
    write(tmp_path, b"nothing else")
    assert last_record(tmp_path) is None
