"""What a checkpoint says of itself, and what is found wrong with it."""

import json
import math
import os
import re

import pytest

from core.checkpoint.manifest import (
    CONFIG_FILE,
    LAYOUT,
    TENSORS,
    Damaged,
    Manifest,
    Progress,
    Written,
    file_problems,
    manifest_digest,
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
    files = {name: Written(0, "0" * 8) for name in (CONFIG_FILE, TENSORS)} | (files or {})
    return Manifest(progress=progress, kind="full", world_size=2, versions={"torch": "2"}, files=files)


def file(storage, name, content=b"content"):
    with storage.create(f"step-3/{name}") as made:
        made.write(content)
    return Written(made.n_bytes, made.sums())


def test_what_is_written_is_read(storage):
    said = manifest({"a": file(storage, "a")})
    write_manifest(storage, "step-3", said)
    assert read_manifest(storage, "step-3") == said
    assert file_problems(storage, "step-3", {"a": said.files["a"]}) == []


def test_every_file_is_read_once(storage, monkeypatch):
    files = {name: file(storage, name) for name in "abc"}
    opened = []
    sums = Storage.sums
    monkeypatch.setattr(Storage, "sums", lambda self, name, *rest: (opened.append(name), sums(self, name, *rest))[1])
    assert file_problems(storage, "step-3", files) == []
    assert opened == ["step-3/a", "step-3/b", "step-3/c"]


def test_what_is_wrong_with_files_is_said(storage, tmp_path):
    files = {name: file(storage, name) for name in ("whole", "short", "flipped", "gone")}
    (tmp_path / "step-3/short").write_bytes(b"conten")
    (tmp_path / "step-3/flipped").write_bytes(b"cOntent")
    (tmp_path / "step-3/gone").unlink()
    assert file_problems(storage, "step-3", files) == [
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
    for nonsense in (text[:-20], "[]", "{}", "\x00", text.replace("96", "9" * 5000), '{"a":' * 9999):
        path.write_text(nonsense)
        with pytest.raises(Damaged, match="^manifest.json(:| was| is)"):
            read_manifest(storage, "step-3")
    path.unlink()
    os.mkfifo(path)  # to open it would wait for a writer
    with pytest.raises(Damaged, match="cannot be read: it is no regular file"):
        read_manifest(storage, "step-3")


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("progress.step", "3", "progress: step: expected int, got '3'"),
        ("progress.step", -1, "names step -1"),
        ("progress.step", True, "progress: step: expected int, got True"),
        ("progress.tokens", 2**63, "progress: tokens: a whole number must be from"),
        ("progress.places", {"position": 1}, r"progress: places: expected list\[dict\[str, int\]\], got"),
        ("progress.validation_loss", "low", "progress: validation_loss: expected float or None, got 'low'"),
        ("progress.steps", 3, "progress: steps is unknown"),
        ("progress", [], r"progress: expected dict\[str, Any\], got \[\]"),
        ("kind", "half", "kind: expected 'full' or 'model', got 'half'"),
        ("world_size", 0, "names world_size 0"),
        ("layout", 0, "names layout 0"),
        ("layout", "1", "layout: expected int, got '1'"),
        ("layout", None, "layout: expected int, got None"),
        ("versions", ["torch"], r"versions: expected dict\[str, str\]"),
        ("files", {}, "names no config.json; no tensors.json"),
        ("files.more", {"n_bytes": 1}, "more: crc32 is missing"),
        ("files.more", {"n_bytes": 1.5, "crc32": "0" * 8}, "more: n_bytes: expected int, got 1.5"),
        ("files.more", {"n_bytes": -1, "crc32": "0" * 8}, "names the size of more -1"),
        ("files.more", {"n_bytes": 1, "crc32": "F" * 8}, "names more with a crc32 that is none"),
        ("files.more", {"n_bytes": 1, "crc32": "0" * 16}, "names more with a crc32 that is none"),
        ("files.more", {"n_bytes": 2**24 + 1, "crc32": "0" * 8}, "names more with a crc32 that is none"),
        ("files.more", {"n_bytes": 2**62, "crc32": "0" * 8}, "names more with a crc32 that is none"),
        ("files.more", {"n_bytes": 1, "sha256": "0" * 64}, "more: crc32 is missing, sha256 is unknown"),
        ("files.more", None, "files: more: expected dict"),
        ("more", 1, "more is unknown"),
    ],
)
def test_a_manifest_that_vouches_for_nonsense(storage, tmp_path, where, value, words):
    path = tmp_path / "step-3/manifest.json"
    write_manifest(storage, "step-3", manifest())
    said = json.loads(path.read_text())
    del said["digest"]
    *outer, last = where.split(".")
    part = said
    for name in outer:
        part = part[name]
    part[last] = value
    path.write_text(json.dumps({**said, "digest": manifest_digest(said)}))
    with pytest.raises(Damaged, match=f"^manifest.json:? {words}"):
        read_manifest(storage, "step-3")


def test_a_loss_that_is_no_number_is_kept(storage):
    for loss in (math.nan, math.inf, 2.5, None):
        said = manifest()
        said.progress.validation_loss = loss
        write_manifest(storage, "step-3", said)
        assert repr(read_manifest(storage, "step-3").progress.validation_loss) == repr(loss)


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
