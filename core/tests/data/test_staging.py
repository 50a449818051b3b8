import fcntl
import os
import time
from pathlib import Path

import pytest

from core.data import staging
from core.data.staging import remove_stale, staging_folder

DAY_S = 24 * 3600


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "corpora").mkdir()
    return tmp_path / "corpora" / "set-0123456789abcdef"


def left(place: Path, lock: str | None, age_s: float = 0.0) -> Path:
    """A folder of a process that is gone."""
    folder = place.with_name(f"{place.name}.{len(list(place.parent.iterdir())):012x}")
    (folder / "complete").mkdir(parents=True)
    (folder / "complete" / "train.starts").write_bytes(b"x" * 10)
    if lock is not None:
        (folder / "lock").write_text(lock)
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - age_s,) * 2)
    return folder


def test_it_goes_with_what_is_left_in_it(place, logged):
    with pytest.raises(KeyboardInterrupt), staging_folder(place) as folder:
        (folder / "complete").mkdir()
        (folder / "complete" / "file").write_text("x")
        (folder / "complete").rename(place)
        (folder / "other").write_text("x")
        raise KeyboardInterrupt
    assert list(place.parent.iterdir()) == [place] and (place / "file").read_text() == "x" and logged == []


def test_that_of_a_living_process_stays(place, logged):
    with staging_folder(place) as folder:
        for path in (folder / "lock", folder):
            os.utime(path, (0, 0))
        remove_stale(place.parent)
        with staging_folder(place) as other:
            assert folder.exists() and other.exists() and folder != other
        assert folder.exists() and not other.exists()
    assert list(place.parent.iterdir()) == [] and logged == []


def test_that_of_a_dead_process_goes_whatever_it_prepared(place, logged):
    folders = [left(place, staging._boot_id()), left(place.with_name("another-set"), staging._boot_id())]
    with staging_folder(place):
        assert not any(folder.exists() for folder in folders)
    assert sorted(logged) == sorted(
        f"INFO: removed {folder}, which an interrupted preparation left" for folder in folders
    )


@pytest.mark.parametrize("lock", [None, "", "another kernel"])
def test_where_the_lock_says_nothing_the_age_does(place, lock):
    young, old = left(place, lock, DAY_S - 100), left(place, lock, DAY_S + 100)
    written = left(place, lock, DAY_S + 100)
    os.utime(written / "complete" / "train.starts")
    remove_stale(place.parent)
    assert young.exists() and written.exists() and not old.exists()


def test_an_old_one_whose_lock_is_held_elsewhere_stays(place):
    folder = left(place, "another kernel", 2 * DAY_S)
    with open(folder / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_stale(place.parent)
        assert folder.exists()
    remove_stale(place.parent)
    assert not folder.exists()


def test_without_a_name_of_the_kernel_only_age_counts(place, monkeypatch, tmp_path):
    monkeypatch.setattr(staging, "_BOOT_ID", tmp_path / "none")
    young, old = left(place, ""), left(place, "", 2 * DAY_S)
    remove_stale(place.parent)
    assert young.exists() and not old.exists()


def test_a_file_system_without_locks(place, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    young, old = left(place, staging._boot_id()), left(place, staging._boot_id(), 2 * DAY_S)
    with staging_folder(place) as folder:
        remove_stale(place.parent)
        assert folder.exists() and young.exists() and not old.exists()
    assert list(place.parent.iterdir()) == [young]


def test_nothing_else_is_touched(place, tmp_path):
    old = time.time() - 9 * DAY_S
    (place / "deep").mkdir(parents=True)
    (place.parent / "set.txt").write_text("x")
    (place.parent / "set.00000000000a").write_text("a file")
    (place.parent / "my.folder.0123").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (place.parent / "set.00000000000b").symlink_to(tmp_path / "elsewhere")
    for path in place.parent.rglob("*"):
        os.utime(path, (old, old))
    before = sorted(place.parent.rglob("*"))
    remove_stale(place.parent)
    assert sorted(place.parent.rglob("*")) == before and (tmp_path / "elsewhere").exists()


def test_what_cannot_be_removed_is_named(place, logged, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    folder = left(place, staging._boot_id())
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", fail)
        remove_stale(place.parent)
    assert logged == [f"WARNING: {folder} may be left of an interrupted preparation: [Errno 13] Permission denied: 'x'"]
