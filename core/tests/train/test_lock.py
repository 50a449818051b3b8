"""The lock on a run's folder: who is kept out, and a folder that does not stay where it was."""

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_run import saved_run

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.train.lock import FolderLock
from core.train.trainer import Trainer

NONE = Checkpoint()


@pytest.fixture
def lock() -> Iterator[Callable[[Path, Checkpoint], FolderLock]]:
    """Lock a folder until the test ends."""
    with ExitStack() as locks:
        yield lambda folder, checkpoint=NONE: locks.enter_context(FolderLock(folder, checkpoint))


def test_one_process_at_a_time_is_in_a_folder(tmp_path, lock):
    said = f"is in use by process {os.getpid()} on {socket.gethostname()}: wait until it ends, or choose another with"
    with FolderLock(tmp_path, NONE):
        with pytest.raises(UserError, match=f"{said} --dump_folder"):
            lock(tmp_path)
    lock(tmp_path)


def test_two_runs_do_not_share_a_folder_of_checkpoints(tmp_path, lock):
    shared = Checkpoint(enable=True, folder=str(tmp_path / "shared"))
    lock(tmp_path / "one", shared)
    lock(tmp_path / "three")
    with pytest.raises(UserError, match="choose another with --checkpoint.folder"):
        lock(tmp_path / "two", shared)
    lock(tmp_path / "two")  # what it had of the two is free again


def test_a_lock_leaves_no_descriptor_behind(tmp_path, lock):
    before = os.listdir("/proc/self/fd")
    shared = Checkpoint(enable=True, folder=str(tmp_path / "shared"))
    with FolderLock(tmp_path / "one", shared) as first:
        with pytest.raises(UserError):
            lock(tmp_path / "two", shared)
    assert os.listdir("/proc/self/fd") == before and first.lost() == ""
    FolderLock(tmp_path / "one", shared).__enter__()  # and is forgotten
    assert os.listdir("/proc/self/fd") == before


def test_what_becomes_of_a_folder_is_told(tmp_path, lock, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, moved = tmp_path / "run", tmp_path / "moved"
    held = lock(Path("run"))
    assert held.lost() == ""
    run.rename(moved)
    renamed = f"{run} was renamed to {moved} while the run was writing there: to go on, give it its name back"
    assert held.lost() == renamed
    run.mkdir()  # another one, which nobody locked
    assert held.lost() == renamed
    run.rmdir()
    moved.rename(run)
    monkeypatch.chdir("/")
    assert held.lost() == ""
    shutil.rmtree(run)
    removed = f"{run} was removed while the run was writing there: begin again in another"
    assert held.lost() == removed
    run.mkdir()
    assert held.lost() == removed


def test_a_lock_that_was_removed_is_taken_again(tmp_path, lock, caplog, monkeypatch):
    logger = logging.getLogger("armature")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    held = lock(tmp_path)
    (tmp_path / ".lock").unlink()
    assert held.lost() == "" and held.lost() == ""
    assert caplog.messages == [f"{tmp_path}/.lock was removed while the run was writing there; it is locked again"]
    with pytest.raises(UserError, match="is in use by process"):
        lock(tmp_path)
    (tmp_path / ".lock").unlink()
    lock(tmp_path)  # another run, that found no lock
    assert "is in use by process" in held.lost() and "begin again in another" in held.lost()


def test_a_link_that_leads_elsewhere_is_another_folder(tmp_path, lock):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "run").symlink_to("one")
    held = lock(tmp_path / "run")
    assert held.lost() == ""
    (tmp_path / "run").unlink()
    (tmp_path / "run").symlink_to("two")
    assert held.lost().startswith(f"{tmp_path}/run was renamed to {tmp_path}/one while")


def test_a_folder_that_cannot_be_seen_for_a_while_is_not_lost(tmp_path, lock, monkeypatch):
    held = lock(tmp_path)

    def fail(*args: object) -> None:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        assert held.lost() == ""


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace(folder: Path) -> None:
    rename(folder)
    folder.mkdir()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Where the text is, tokenised once."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def run(text, tmp_path) -> Trainer.Config:
    """A run in a folder of its own."""
    run = saved_run(text)
    run.dump_folder = str(tmp_path / "run")
    return run


@pytest.mark.parametrize(("step", "change"), [(3, rename), (4, replace), (6, shutil.rmtree)])
def test_a_run_whose_folder_is_gone_ends_and_makes_no_new_one(run, tmp_path, monkeypatch, capsys, step, change):
    """At a step that is not saved, at one that is, and at the last one."""
    folder = tmp_path / "run"
    trainer = run.build()
    take_step = Trainer.step

    def change_after(trainer: Trainer, number: int) -> object:
        info = take_step(trainer, number)
        if number == step:
            change(folder)
        return info

    monkeypatch.setattr(Trainer, "step", change_after)
    with pytest.raises(UserError, match=f"^{folder} was re(nam|mov)ed"):
        trainer.run()
    assert "kept in" not in capsys.readouterr().out
    assert not folder.exists() or (change is replace and not os.listdir(folder))
    if change is not shutil.rmtree:
        assert sorted(os.listdir(tmp_path / "moved/checkpoint")) == [".lock", "step-2"]


def test_a_folder_that_goes_after_the_last_save_is_told(run, tmp_path, monkeypatch, capsys):
    trainer = run.build()
    monkeypatch.setattr(trainer.checkpoints, "finish", lambda: rename(tmp_path / "run"))
    with pytest.raises(UserError, match="was renamed to"):
        trainer.run()
    assert "kept in" not in capsys.readouterr().out


def test_a_save_makes_no_place_that_is_gone(run, tmp_path, monkeypatch):
    """Removed between the last look and the save."""
    trainer = run.build()
    monkeypatch.setattr(trainer.lock, "lost", lambda: "")
    shutil.rmtree(tmp_path / "run/checkpoint")
    with pytest.raises(UserError, match="step-2 could not be saved: No such file or directory"):
        trainer.run()
    assert not (tmp_path / "run/checkpoint").exists()
