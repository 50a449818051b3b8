"""Files on a disk that does not take them."""

import errno
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config.errors import UserError
from core.runtime import disk
from core.runtime.disk import AppendedFile, OptionalFile, needed, replace_file
from core.runtime.log import log_to, start_logging

log = logging.getLogger("armature")


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def out(capsys) -> Callable[[], list[str]]:
    """The lines that were logged since the last call."""
    start_logging()
    return lambda: capsys.readouterr().out.splitlines()


@pytest.fixture
def room(monkeypatch) -> list[int]:
    """So many bytes are left on the disk for files that grow; where a second number stands, none can be cut."""
    left = [10**9]

    class Disk(io.FileIO):
        def truncate(self, size: int | None = None) -> int:
            if len(left) > 1:
                raise full()
            return super().truncate(size)

        def write(self, data: bytes) -> int:
            if not left[0]:
                raise full()
            n_bytes = super().write(data[: left[0]])
            left[0] -= n_bytes
            return n_bytes

    opened = Path.open

    def open_file(path: Path, mode: str = "r", buffering: int = -1, **settings: object) -> object:
        return Disk(path, mode) if buffering == 0 else opened(path, mode, buffering, **settings)

    monkeypatch.setattr(Path, "open", open_file)
    return left


def test_each_cause_is_told_once_and_the_end_of_it(out):
    file = OptionalFile("the log")
    for number in (errno.ENOSPC, errno.ENOSPC, errno.EROFS, errno.ENOSPC, None, None, errno.ENOSPC):
        with file.attempt():
            if number is not None:
                raise OSError(number, os.strerror(number))
    none, read_only = (
        f"warning: the log cannot be written: {os.strerror(number)}; the run goes on without it"
        for number in (errno.ENOSPC, errno.EROFS)
    )
    assert out() == [none, read_only, "the log is written again", none]


def test_only_the_disk_is_forgiven():
    with pytest.raises(ValueError), OptionalFile("the log").attempt():
        raise ValueError("a mistake of ours")


def test_what_is_needed_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match="^cannot write in runs/a: No space left on device; choose another$"):
        with needed("runs/a", "choose another"):
            raise full()


def test_records_wait_for_a_disk_and_none_is_torn(tmp_path, out, room):
    path = tmp_path / "records"
    file = AppendedFile(path)
    file.append(b"first\n")
    room[0] = 4
    file.append(b"second\n")
    assert path.read_bytes() == b"first\n"
    file.append(b"third\n", b"fourth\n")
    room[0] = 10**9
    file.append(b"fifth\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\nfifth\n"
    assert out() == [
        f"warning: {path} cannot be written: No space left on device; the run goes on without it",
        f"{path} is written again",
    ]


def test_a_record_that_could_not_be_cut_off_again_is_not_torn_in_the_end(tmp_path, out, room):
    path = tmp_path / "records"
    file = AppendedFile(path)
    file.append(b"first\n")
    room[0] = 4
    room.append(0)  # nothing can be cut
    file.append(b"second\n")
    assert path.read_bytes() == b"first\nseco"
    room[:] = [10**9]
    file.append(b"third\n")
    assert path.read_bytes() == b"first\nsecond\nthird\n"


def test_records_that_come_too_late_are_counted(tmp_path, out, room, monkeypatch):
    monkeypatch.setattr(disk, "MOST_WAITING", 3)
    file = AppendedFile(tmp_path / "records")
    room[0] = 0
    for number in range(5):
        file.append(b"%d\n" % number)
    file.close()
    assert out()[1:] == [f"warning: 5 records are missing in {tmp_path}/records"]
    room[0] = 10**9
    file.append(b"5\n")
    file.close()
    assert (tmp_path / "records").read_bytes() == b"2\n3\n4\n5\n"
    assert out()[1:] == [f"warning: 2 records are missing in {tmp_path}/records"]


def test_a_file_that_was_moved_away_begins_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = AppendedFile(Path("records"))
    file.append(b"first\n")
    (tmp_path / "records").rename(tmp_path / "old")
    monkeypatch.chdir("/")
    file.append(b"second\n")
    assert (tmp_path / "old").read_bytes() == b"first\n" and (tmp_path / "records").read_bytes() == b"second\n"


def test_a_log_on_a_full_disk_catches_up(tmp_path, out, room):
    path = tmp_path / "logs/rank-0.log"
    with log_to(path):
        log.info("first")
        room[0] = 0
        log.info("second")
        room[0] = 10**9
        third = log.makeRecord(log.name, logging.INFO, __file__, 0, "third \udcff", (), None)
        log.handlers[-1].handle(third)  # the file's alone: pytest could not send a surrogate to another process
    log.info("another run's")
    messages = [line.split(" ", 3)[3] for line in path.read_text().splitlines()]
    cause = f"{path} cannot be written: No space left on device; the run goes on without it"
    assert messages == ["first", "second", cause, "third \\udcff", f"{path} is written again"]
    assert out()[1:3] == ["second", f"warning: {cause}"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "config.json"
    replace_file(path, b"old")

    def fail(*args: object) -> None:
        raise full()

    if call == "write":

        class Disk(io.BufferedWriter):
            write = fail

        monkeypatch.setattr(Path, "open", lambda path, mode: Disk(io.FileIO(path, mode)))
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["config.json"]


def test_what_a_killed_process_left_is_no_hindrance_and_no_link_is_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / "run").mkdir()
    for name in (".config.json.growing", "config.json"):
        (tmp_path / "run" / name).symlink_to(elsewhere)
    replace_file(tmp_path / "run/config.json", b"new")
    assert elsewhere.read_text() == "mine" and (tmp_path / "run/config.json").read_bytes() == b"new"
    assert os.listdir(tmp_path / "run") == ["config.json"] and not (tmp_path / "run/config.json").is_symlink()


def test_the_umask_says_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "config.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o640
