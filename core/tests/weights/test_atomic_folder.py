"""A folder that is there whole, or not at all, and touches nothing that is not its own."""

import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch

from core.config.errors import UserError
from core.weights import atomic_folder as module
from core.weights.atomic_folder import atomic_folder
from core.weights.shard_file import Output, write_shard

ONES = Output("a", [3], torch.float32, lambda: iter([torch.ones(3)]))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_two_at_once_do_not_touch_each_other(tmp_path: Path) -> None:
    """As in two containers, where both processes have the same number."""
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/model: Directory not empty$"):
        with atomic_folder(tmp_path / "model") as first:
            (first / "file").write_text("first")
            with atomic_folder(tmp_path / "model") as second:
                assert first != second
                (second / "file").write_text("second")
            assert (first / "file").read_text() == "first"
    assert names(tmp_path) == ["model"] and (tmp_path / "model/file").read_text() == "second"


def test_what_another_left_is_not_touched(tmp_path: Path) -> None:
    for name in (f".model.partial-{os.getpid()}", ".model.partial-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(tmp_path / "model"):
        pass
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(path: Path, **options: bool) -> None:
        for each in (number, signal.SIGINT):
            os.kill(os.getpid(), each)  # once more, while it cleans up
        rmtree(path, **options)

    rmtree = module.shutil.rmtree
    monkeypatch.setattr(module.shutil, "rmtree", remove)
    assert threading.current_thread() is threading.main_thread()
    before = [signal.getsignal(each) for each in (number, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended, atomic_folder(tmp_path / "model") as growing:
        (growing / "file").touch()
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number and names(tmp_path) == []
    assert [signal.getsignal(each) for each in (number, signal.SIGINT)] == before


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with atomic_folder(tmp_path / "model"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert names(tmp_path) == ["model"] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_all_has_reached_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        done.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with atomic_folder(tmp_path / "model") as growing:
        (growing / "sub").mkdir()
        for name in ("one", "two", "sub/three"):
            (growing / name).touch()
    assert done[-2:] == ["renamed", tmp_path.name]
    assert sorted(done[:-2]) == sorted(["one", "two", "three", "sub", growing.name])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "model") as growing:
            write_shard(growing / "model.safetensors", [ONES])
            (growing / "config.json").touch()
    finally:
        os.umask(before)
    for path, mode in ((tmp_path / "model", 0o777), *((file, 0o666) for file in (tmp_path / "model").iterdir())):
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~mask, path


def test_a_file_of_weights_replaces_none_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link.safetensors").symlink_to("target")
    (tmp_path / "new.safetensors").symlink_to("nothing")
    for name in ("link", "new"):
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/{name}.safetensors: .*File exists"):
            write_shard(tmp_path / f"{name}.safetensors", [ONES])
    assert names(tmp_path) == ["link.safetensors", "new.safetensors", "target"]
    assert (tmp_path / "target").read_text() == "mine"
