"""Files below one place, on this machine and behind an fsspec URI."""

import binascii
import os
import uuid

import fsspec
import pytest

from core.checkpoint.storage import CHUNK_BYTES, Storage, steps_in
from core.config.errors import UserError


def sums_of(content: bytes) -> str:
    """The CRC-32 of every 16 MiB, of which there are several."""
    stretches = [content[at : at + 2**24] for at in range(0, len(content), 2**24)]
    assert len(stretches) > 1
    return "".join(f"{binascii.crc32(stretch):08x}" for stretch in stretches)


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return Storage(tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


def test_what_is_written_is_read(storage):
    content = os.urandom(CHUNK_BYTES + 70)
    storage.make("a/b")
    with storage.create("a/b/file") as file:
        file.write(content[:5])
        file.write(memoryview(content)[5:])
    assert storage.read("a/b/file") == content and storage.size("a/b/file") == file.n_bytes == len(content)
    assert storage.sums("a/b/file") == file.sums() == sums_of(content)
    part = bytearray(100)
    storage.read_into(memoryview(part), "a/b/file", CHUNK_BYTES - 50)
    assert part == content[CHUNK_BYTES - 50 : CHUNK_BYTES + 50]
    with pytest.raises(OSError, match="30 bytes are missing at its end"):
        storage.read_into(memoryview(part), "a/b/file", CHUNK_BYTES)


def test_folders(storage):
    assert storage.names() == [] and not storage.exists("a")
    for folder in ("a", "c"):
        storage.make(folder)
        for name in ("y", "x"):
            with storage.create(f"{folder}/{name}") as file:
                file.write(name.encode())
    assert storage.names() == ["a", "c"] and storage.names("a") == ["x", "y"]
    storage.rename("a", "b", last="x")
    assert storage.names() == ["b", "c"] and storage.read("b/y") == b"y"
    with pytest.raises(AssertionError):
        storage.rename("c", "b", last="x")
    storage.remove("b")
    storage.remove("b")
    assert storage.names() == ["c"]


def test_elsewhere_the_last_file_comes_last(monkeypatch):
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    storage.make("a")
    for name in ("m", "a", "z"):
        with storage.create(f"a/{name}") as file:
            file.write(b"1")
    moved = []
    monkeypatch.setattr(storage.fs, "mv", lambda old, new: moved.append(new[-3:]))
    storage.rename("a", "b", last="m")
    assert moved == ["b/a", "b/z", "b/m"]


def test_places_have_names(tmp_path):
    assert str(Storage(tmp_path)) == str(tmp_path)
    assert str(Storage("memory://some/run")) == "memory:///some/run"
    assert fsspec.filesystem("memory").store is Storage("memory://x").fs.store


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere://x", "ValueError: Protocol not known: nowhere"),
        ("s3://bucket/run", "ImportError: Install s3fs"),
        ("ftp://127.0.0.1:9/run", "ConnectionRefusedError: "),
        ("ftp://", "TypeError: "),
        ("dir://x", "AttributeError: "),
        ("simplecache://x", "ValueError: "),
        ("zip://x", "IsADirectoryError: "),
    ],
)
def test_places_that_nothing_reaches_are_one_line(place, words):
    with pytest.raises(UserError) as error:
        Storage(place)
    text = str(error.value)
    assert text.startswith(f"nothing here can reach {place}: {words}") and "\n" not in text and len(text) < 400


def test_a_place_that_can_only_be_read_is_one_line():
    storage = Storage("data://x")
    with pytest.raises(UserError, match="^data://x cannot be read: NotImplementedError: $"):
        steps_in(storage)
    with pytest.raises(OSError, match="ValueError: Read only filesystem"):
        storage.check_writable()


def test_steps(storage):
    for name in ("step-9", "step-10", "step-11.tmp", "replaced-step-3-1", "step-x", "other"):
        storage.make(name)
        with storage.create(f"{name}/file") as file:
            file.write(b"1")
    assert steps_in(storage) == [9, 10]
