"""What a checkpoint says of itself, and what is found wrong with it."""

import re

import pytest

from core.checkpoint.manifest import (
    LAYOUT,
    Damaged,
    Manifest,
    Progress,
    Written,
    problems,
    read_manifest,
    write_manifest,
)
from core.checkpoint.storage import Storage
from core.config.errors import UserError


@pytest.fixture
def storage(tmp_path):
    storage = Storage(tmp_path)
    storage.make("step-3")
    return storage


def manifest(files=None):
    progress = Progress(step=3, tokens=96, rows=6, rows_per_step=2, places=[{"position": 1}], text="abc")
    return Manifest(progress=progress, kind="full", world_size=2, versions={"torch": "2"}, files=files or {})


def file(storage, name, content=b"content"):
    with storage.create(f"step-3/{name}") as made:
        made.write(content)
    return Written(made.n_bytes, made.hex())


def test_what_is_written_is_read(storage):
    said = manifest({"a": file(storage, "a")})
    write_manifest(storage, "step-3", said)
    assert read_manifest(storage, "step-3") == said
    assert problems(storage, "step-3", said.files) == []


def test_every_file_is_read_once(storage, monkeypatch):
    files = {name: file(storage, name) for name in "abc"}
    opened = []
    digest = Storage.digest
    monkeypatch.setattr(Storage, "digest", lambda self, name: (opened.append(name), digest(self, name))[1])
    assert problems(storage, "step-3", files) == []
    assert opened == ["step-3/a", "step-3/b", "step-3/c"]


def test_what_is_wrong_with_files_is_said(storage, tmp_path):
    files = {name: file(storage, name) for name in ("whole", "short", "flipped", "gone")}
    (tmp_path / "step-3/short").write_bytes(b"conten")
    (tmp_path / "step-3/flipped").write_bytes(b"cOntent")
    (tmp_path / "step-3/gone").unlink()
    assert problems(storage, "step-3", files) == [
        "short has 6 bytes, not 7",
        "flipped has other bytes than were written",
        "gone is missing",
    ]


def test_a_manifest_that_is_no_longer_what_was_written(storage, tmp_path):
    path = tmp_path / "step-3/manifest.json"
    with pytest.raises(Damaged, match="there is no manifest.json: it was never finished"):
        read_manifest(storage, "step-3")
    write_manifest(storage, "step-3", manifest())
    text = path.read_text()
    for changed in (text.replace('"tokens": 96', '"tokens": 97'), re.sub('"digest": ".', '"digest": "?', text)):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(Damaged, match="was changed after it was written"):
            read_manifest(storage, "step-3")
    for nonsense in (text[:-20], "[]", "{}", "\x00"):
        path.write_text(nonsense)
        with pytest.raises(Damaged, match="cannot be read"):
            read_manifest(storage, "step-3")


def test_a_newer_layout_is_no_damage(storage):
    newer = manifest()
    newer.layout = LAYOUT + 1
    write_manifest(storage, "step-3", newer)
    message = rf"step-3 was written in layout {LAYOUT + 1}, and this .* reads up to {LAYOUT}: update"
    with pytest.raises(UserError, match=message):
        read_manifest(storage, "step-3")


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "..\\other", ""])
def test_names_stay_in_the_folder(storage, name):
    write_manifest(storage, "step-3", manifest({name: Written(1, "0")}))
    with pytest.raises(Damaged, match="which is no file in the folder"):
        read_manifest(storage, "step-3")
