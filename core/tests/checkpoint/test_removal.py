"""How checkpoints are removed, and what happens where they cannot be."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from errno import EPERM
from pathlib import Path

import pytest
import torch

from core.checkpoint.find import inspect
from core.checkpoint.manifest import Progress
from core.checkpoint.retention import Removals
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage, steps_in
from core.config.errors import UserError
from core.runtime.ranks import Ranks

WEIGHTS = {"model.weight": torch.arange(12.0).reshape(3, 4)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What was warned of since it was asked last."""
    monkeypatch.setattr(logging.getLogger("armature"), "propagate", True)

    def warnings() -> list[str]:
        found = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        return found

    yield warnings


def saver_in(folder: Path | str) -> Saver:
    settings = Checkpoint(enable=True, keep_latest_k=1, folder=str(folder))
    return Saver(settings, Ranks(), run_folder=Path("/"), config="{}", export=lambda found, path: None)


def save(saver: Saver, *steps: int) -> None:
    for step in steps:
        saver.save(Progress(step=step), WEIGHTS, kind="full", wait=True)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def forbid(monkeypatch: pytest.MonkeyPatch, method: str, forbidden: Callable[[str], bool]) -> None:
    """From here on the system refuses to do this to such names."""
    done = getattr(Storage, method)

    def do(storage: Storage, name: str, *words: str, **options: str) -> None:
        if any(forbidden(each) for each in (name, *words)):
            raise PermissionError(EPERM, os.strerror(EPERM))
        done(storage, name, *words, **options)

    monkeypatch.setattr(Storage, method, do)


def test_what_cannot_be_removed_is_a_warning_and_tried_again(tmp_path, said, monkeypatch):
    saver = saver_in(tmp_path)
    with monkeypatch.context() as patch:
        forbid(patch, "remove", lambda name: name.startswith("removed-"))
        save(saver, 1, 2)
        words = "/removed-step-1-1 cannot be removed: Operation not permitted; the next save tries again"
        assert said() == [f"{tmp_path}{words}"]
        save(saver, 3)
        assert said() == [f"{tmp_path}{words.replace('step-1', 'step-2')}"]
        assert names(tmp_path) == ["removed-step-1-1", "removed-step-2-1", "step-3"]
        assert inspect(saver.storage, "step-3", Ranks()).manifest.progress.step == 3
    save(saver, 4)
    assert names(tmp_path) == ["step-4"] and said() == []


def test_what_cannot_lose_its_name_stays_whole(tmp_path, said, monkeypatch):
    saver = saver_in(tmp_path)
    with monkeypatch.context() as patch:
        forbid(patch, "rename", lambda name: name.startswith("removed-"))
        save(saver, 1, 2)
    assert said() == [f"{tmp_path}/step-1 cannot be removed: Operation not permitted; the next save tries again"]
    for step in (1, 2):
        inspect(saver.storage, f"step-{step}", Ranks())
    save(saver, 3)
    assert names(tmp_path) == ["step-3"] and said() == []


def test_a_folder_that_cannot_be_listed_keeps_all(tmp_path, said, monkeypatch):
    saver = saver_in(tmp_path)
    save(saver, 1)
    with monkeypatch.context() as patch:
        forbid(patch, "names", lambda name: name == "")
        patch.setattr(Storage.names, "__defaults__", ("",))
        save(saver, 2)
    (warning,) = said()
    assert warning.startswith(f"no checkpoint was removed from {tmp_path}: ") and names(tmp_path) == [
        "step-1",
        "step-2",
    ]
    save(saver, 3)
    assert names(tmp_path) == ["step-3"]


def test_a_half_written_save_that_cannot_be_removed_is_out_of_the_way(tmp_path, said, monkeypatch):
    (tmp_path / "step-2.tmp").mkdir()
    (tmp_path / "step-2.tmp/rank-00000.safetensors").write_bytes(b"half")
    saver = saver_in(tmp_path)
    with monkeypatch.context() as patch:
        forbid(patch, "remove", lambda name: name.startswith("removed-"))
        save(saver, 2)
    assert len(said()) == 1
    assert inspect(saver.storage, "step-2", Ranks()).manifest.progress.step == 2


def test_what_killed_processes_left_goes_when_a_run_starts(tmp_path, said):
    for name in ("step-4.tmp", "removed-step-1-1", "removed-step-2.tmp-3", ".probe-1f", "mine", "step-x.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    saver_in(tmp_path).set_aside(0)
    assert names(tmp_path) == ["mine", "step-x.tmp"] and said() == []


def test_of_a_link_the_link_goes(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step-1").symlink_to(tmp_path / "elsewhere")
    Removals(Storage(tmp_path / "run")).remove("step-1")
    assert names(tmp_path / "run") == [] and names(tmp_path / "elsewhere") == ["file"]


def test_behind_a_uri_the_manifest_goes_first(monkeypatch):
    saver = saver_in(f"memory://{uuid.uuid4().hex}")
    save(saver, 1)
    remove, removed = saver.storage.fs.rm, []

    def rm(path: str, recursive: bool = False) -> None:
        if "/step-1" in path:
            removed.append(path.rpartition("/step-1")[2])
        remove(path, recursive=recursive)

    monkeypatch.setattr(saver.storage.fs, "rm", rm)
    save(saver, 2)
    assert removed == ["/manifest.json", ""]
    assert steps_in(saver.storage) == [2]


# The trial before the first step


def test_a_trial_leaves_nothing(tmp_path):
    for place in (tmp_path, f"memory://{uuid.uuid4().hex}"):
        saver = saver_in(place)
        saver.check_writable()
        assert saver.storage.names() == []


@pytest.mark.parametrize("call", ["makedirs", "open", "mv", "rm"])
def test_a_store_that_refuses_is_found_before_the_first_step(monkeypatch, call):
    """Each store has errors of its own; few are `OSError`."""

    class Refused(Exception):
        pass

    def refuse(*args: object, **options: object) -> None:
        raise Refused("no\n  credentials")

    saver = saver_in(f"memory://{uuid.uuid4().hex}")
    with monkeypatch.context() as patch:
        patch.setattr(saver.storage.fs, call, refuse)
        with pytest.raises(UserError) as error:
            saver.check_writable()
    assert str(error.value) == (
        f"no checkpoint can be written in {saver.storage}: Refused: no credentials (rank 0); choose another with "
        "--checkpoint.folder, one that all ranks can write to"
    )


@pytest.mark.parametrize("method", ["make", "create", "rename", "remove"])
def test_a_folder_that_refuses_is_found_before_the_first_step(tmp_path, monkeypatch, method):
    forbid(monkeypatch, method, lambda name: name.startswith(".probe-"))
    with pytest.raises(UserError, match=f"^no checkpoint can be written in {tmp_path}: Operation not permitted"):
        saver_in(tmp_path).check_writable()
