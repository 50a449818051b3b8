"""Links in folders of others: what belongs to a folder is read, and nothing elsewhere is, or is written."""

import os
from pathlib import Path

import pytest

from core.config.errors import UserError
from core.config.links import check_targets, file_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of somebody else, beside a secret."""
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("theirs")
    return tmp_path / "theirs"


def test_what_belongs_to_a_folder_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("file")
    (folder / "sub").mkdir()
    (folder / "sub/other").write_text("theirs")
    (folder / "deep").symlink_to("sub/other")
    (tmp_path / "named").symlink_to(folder)
    for place in (folder, tmp_path / "named"):
        for name in ("file", "link", "deep"):
            path = file_in(place, name)
            assert path == place / name and path.read_text() == "theirs"
        assert file_in(place, "none") is None and file_in(place, "n" * 300) is None
    assert file_in(tmp_path / "nowhere", "file") is None


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "out/secret", "chain"])
def test_a_link_that_leads_out_is_refused(folder: Path, target: str) -> None:
    (folder / "out").symlink_to("..")
    (folder / "chain").symlink_to("out/secret")
    (folder / "config.json").symlink_to(target)
    with pytest.raises(UserError, match=f"^{folder}/config.json is a link that leads out of its folder, to /"):
        file_in(folder, "config.json")


def test_a_snapshot_of_hugging_faces_cache_has_its_blobs(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots/0f1e"
    for place in (snapshot, model / "blobs", model / "refs", tmp_path / "models--a--c/blobs"):
        place.mkdir(parents=True)
    (model / "blobs/4711").write_text("weights")
    (model / "refs/main").write_text("0f1e")
    (tmp_path / "models--a--c/blobs/12").write_text("of another model")
    (snapshot / "config.json").symlink_to("../../blobs/4711")
    (snapshot / "main").symlink_to("../../refs/main")
    (snapshot / "other").symlink_to("../../../models--a--c/blobs/12")
    (tmp_path / "named").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "named"):
        path = file_in(place, "config.json")
        assert path is not None and path.read_text() == "weights"
        for name in ("main", "other"):
            with pytest.raises(UserError, match="is a link that leads out of its folder"):
                file_in(place, name)


def test_what_is_no_regular_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")  # to open it would wait for a writer
    (folder / "to the pipe").symlink_to("pipe")
    (folder / "folder").mkdir()
    for name in ("pipe", "to the pipe", "folder"):
        with pytest.raises(UserError, match=f"^{folder}/{name} is no regular file$"):
            file_in(folder, name)
    (folder / "broken").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="broken cannot be read: No such file or directory"):
        file_in(folder, "broken")
    with pytest.raises(UserError, match="loop cannot be read: Too many levels of symbolic links"):
        file_in(folder, "loop")


def test_what_is_written_is_no_link(folder: Path, tmp_path: Path) -> None:
    check_targets(folder, ["file", "none"])
    check_targets(tmp_path / "nowhere", ["file"])
    (folder / "inside").symlink_to("file")
    (folder / "outside").symlink_to("../secret")
    (folder / "nothing yet").symlink_to("../new")
    os.mkfifo(folder / "pipe")
    for name, kind in {
        "inside": f"a link to {folder}/file",
        "outside": f"a link to {tmp_path}/secret",
        "nothing yet": f"a link to {tmp_path}/new",
        "pipe": "no regular file",
    }.items():
        words = f"{folder}/{name} is {kind}, and a run writes there: remove it, or choose another folder"
        with pytest.raises(UserError, match=f"^{words}$"):
            check_targets(folder, ["none", name])
