"""Folders of another user, and links in folders: one line each, and nothing is written elsewhere."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy_run import toy_run

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.testing.toy import Toy, on_cpu
from core.train.folder import check_run_folder, make_run_folder
from core.train.lock import FolderLock
from core.weights.companions import tokenizer_in
from core.weights.convert import main as convert
from core.weights.folder import load_folder
from core.weights.hf import save_hf

NONE, SAVES = Checkpoint(), Checkpoint(enable=True)
FAMILIES: dict[str, Any] = {"toy": Toy}


CAPABILITIES_V3 = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2


class Mask(ctypes.Structure):
    """Capabilities of a thread, from Linux's capability.h."""

    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


@contextmanager
def ruled_by_modes() -> Iterator[None]:
    """Files' modes bind this thread while the block runs, even that of root, who may otherwise do all."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, masks = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (Mask * 2)()
    assert libc.capget(header, masks) == 0
    before = masks[0].effective
    masks[0].effective &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    assert libc.capset(header, masks) == 0
    yield
    masks[0].effective = before
    assert libc.capset(header, masks) == 0


@pytest.fixture(params=["unreadable", "read-only"])
def theirs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with a model and a run that this process may not touch, until the test ends."""
    theirs = tmp_path / "theirs"
    save_hf(on_cpu(Toy.Config()), theirs / "model")
    (theirs / "run").mkdir()
    (theirs / "run/metrics.jsonl").touch()
    folders = (theirs / "model", theirs / "run", theirs)
    for folder in folders:
        folder.chmod(0o555 if request.param == "read-only" else 0)
    with ruled_by_modes():
        yield theirs
    for folder in reversed(folders):
        folder.chmod(0o755)


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that `convert` ends with."""
    with pytest.raises(SystemExit) as ended:
        convert(FAMILIES, [str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_a_run_in_a_folder_of_another_user(theirs: Path) -> None:
    folder = str(theirs / "run/new")
    with pytest.raises(UserError, match="Permission denied; choose another with --dump_folder"):
        check_run_folder(folder, SAVES, {})
        make_run_folder(folder, "toy", {})
    for place in (theirs, theirs / "run"):
        with pytest.raises(UserError, match="Permission denied") as error, FolderLock(place, NONE):
            pass
        assert "\n" not in str(error.value)


def test_checkpoints_in_a_folder_of_another_user(theirs: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path / "mine")
    run.checkpoint = Checkpoint(enable=True, folder=str(theirs / "run"))
    with pytest.raises(UserError, match=f"{theirs}/run.*Permission denied") as error:
        run.build()
    assert "\n" not in str(error.value)


def test_weights_in_a_folder_of_another_user(
    theirs: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "theirs/new" in (line := refusal(capsys, "from-hf", theirs / "model", theirs / "new"))
    assert "Permission denied" in line
    if "unreadable" in request.node.name:
        line = refusal(capsys, "from-hf", theirs / "model", tmp_path / "mine")
        assert line.endswith("theirs/model/config.json cannot be read: Permission denied")
        with pytest.raises(UserError, match="Permission denied"):
            load_folder(on_cpu(Toy.Config()), theirs / "model")
    else:
        convert(FAMILIES, ["from-hf", str(theirs / "model"), str(tmp_path / "mine")])


# Links


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "secret"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_no_link_makes_an_export_hold_what_lies_elsewhere(
    tmp_path: Path, secret: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(on_cpu(Toy.Config()), tmp_path / "theirs")
    (tmp_path / "theirs" / name).symlink_to("../secret")
    line = refusal(capsys, "from-hf", tmp_path / "theirs", tmp_path / "mine")
    assert line == f"error: {tmp_path}/theirs/{name} is a link that leads out of its folder, to {secret}: not read"
    assert sorted(os.listdir(tmp_path)) == ["secret", "theirs"]
    if name == "tokenizer.json":
        with pytest.raises(UserError, match="is a link that leads out of its folder"):
            tokenizer_in(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_no_weights_are_read_through_a_link_that_leads_out(tmp_path: Path, name: str) -> None:
    save_hf(on_cpu(Toy.Config()), tmp_path / "theirs")
    (tmp_path / "theirs" / name).unlink(missing_ok=True)
    (tmp_path / "theirs" / name).symlink_to("../secret")
    (tmp_path / "secret").write_text("{}")
    with pytest.raises(UserError, match=f"{name} is a link that leads out of its folder"):
        load_folder(on_cpu(Toy.Config()), tmp_path / "theirs")


def test_a_snapshot_of_hugging_faces_cache_is_read_and_converted(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f1e", tmp_path / "models--a--b/blobs"
    save_hf(on_cpu(Toy.Config()), snapshot)
    blobs.mkdir()
    (snapshot / "generation_config.json").write_text("{}")
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    load_folder(on_cpu(Toy.Config()), snapshot)
    convert(FAMILIES, ["from-hf", str(snapshot), str(tmp_path / "mine")])
    copy = tmp_path / "mine/generation_config.json"
    assert copy.read_text() == "{}" and not copy.is_symlink()


@pytest.mark.parametrize("name", [".lock", "config.json", "metrics.jsonl", "torchrun-id"])
def test_a_run_writes_through_no_link(tmp_path: Path, secret: Path, name: str) -> None:
    run = toy_run(tmp_path)
    folder = Path(str(run.dump_folder))
    folder.mkdir()
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{folder}/{name} is a link to {secret}, and a run writes there: remove it"):
        run.build()
    assert secret.read_text() == "mine" and os.listdir(folder) == [name]


def test_the_lock_of_checkpoints_is_no_link(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    (tmp_path / "run/checkpoint/.lock").symlink_to(secret)
    with pytest.raises(UserError, match="checkpoint/.lock is a link to"), FolderLock(tmp_path / "run", SAVES):
        pass
    assert secret.read_text() == "mine"


def test_a_lock_that_holds_nonsense_is_read(tmp_path: Path) -> None:
    with FolderLock(tmp_path, NONE):
        (tmp_path / ".lock").write_bytes(b"\xff\xfe" * 1000 + b"\nmore")
        with pytest.raises(UserError, match="is in use by .{200}: wait until it ends"), FolderLock(tmp_path, NONE):
            pass
