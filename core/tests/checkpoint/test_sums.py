"""The sums of a file, as it is written and as it is read, against those of its stretches by hand."""

import binascii
import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch

from core.checkpoint import storage as storage_module
from core.checkpoint import sums as sums_module
from core.checkpoint.find import inspect
from core.checkpoint.manifest import Damaged, Progress, Written, file_problems, manifest_digest
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage
from core.checkpoint.sums import CRC32, OF_LAYOUT
from core.runtime.cores import n_cores
from core.runtime.ranks import Ranks

STRETCH = 100


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(storage_module, "SUMMED_BYTES", 32)


SHORT = CRC32._replace(stretch_bytes=STRETCH)


def stretches(content):
    return [content[at : at + STRETCH] for at in range(0, len(content), STRETCH)] or [b""]


def crc32(content):
    return "".join(f"{binascii.crc32(stretch):08x}" for stretch in stretches(content))


def sha256_of_all(content):
    hashes = [hashlib.sha256(stretch).digest() for stretch in stretches(content)]
    return hashlib.sha256(b"".join(hashes)).hexdigest() if len(hashes) > 1 else hashes[0].hex()


@pytest.mark.parametrize("place", ["here", "memory://there"])
@pytest.mark.parametrize("n_bytes", [0, 1, STRETCH - 1, STRETCH, STRETCH + 1, 2 * STRETCH, 5 * STRETCH + 7])
def test_written_and_read_by_threads_they_are_the_same(tmp_path, monkeypatch, n_bytes, place):
    monkeypatch.setattr(storage_module, "RunningSums", lambda: sums_module.RunningSums(SHORT))
    draw = random.Random(n_bytes)
    storage = Storage(tmp_path if place == "here" else f"{place}{n_bytes}")
    content = draw.randbytes(n_bytes)
    with storage.create("file") as file:
        rest = content
        while rest:
            size = draw.randrange(1, 2 * STRETCH)
            file.write(rest[:size])
            rest = rest[size:]
    assert file.sums() == storage.sums("file", SHORT) == crc32(content)
    assert SHORT.n_digits(n_bytes) == len(crc32(content))


def test_every_layout_has_its_algorithm(tmp_path, monkeypatch):
    for layout in (2, 3):
        monkeypatch.setitem(OF_LAYOUT, layout, OF_LAYOUT[layout]._replace(stretch_bytes=STRETCH))
    (tmp_path / "file").write_bytes(content := random.Random(0).randbytes(3 * STRETCH + 1))
    stated = {1: hashlib.sha256(content).hexdigest(), 2: sha256_of_all(content), 3: crc32(content)}
    assert stated.keys() == OF_LAYOUT.keys() and len(set(stated.values())) == 3
    storage = Storage(tmp_path)
    for layout in stated:
        for other, sums in stated.items():
            problems = file_problems(storage, ".", {"file": Written(len(content), sums)}, layout)
            assert problems == ([] if other == layout else ["file has other bytes than were written"]), (layout, other)


def as_layout_2(folder):
    """Have a checkpoint of short files be as layout 2 was."""
    path = folder / "manifest.json"
    said = json.loads(path.read_text())
    del said["digest"]
    said["layout"] = 2
    for name, file in said["files"].items():
        assert file.pop("crc32") == f"{binascii.crc32(content := (folder / name).read_bytes()):08x}"
        file["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps({**said, "digest": manifest_digest(said)}))


def test_a_checkpoint_of_layout_2_is_verified_and_read(tmp_path):
    saver = Saver(Checkpoint(enable=True), Ranks(), run_folder=tmp_path, config="{}", export=lambda found, path: None)
    Path(saver.storage.root).mkdir()
    weight = torch.arange(12.0).reshape(3, 4)
    saver.save(Progress(step=3), {"model.w": weight}, kind="full", wait=True)
    folder = Path(saver.storage.path("step-3"))
    as_layout_2(folder)
    found = saver.find()
    assert found is not None and found.manifest.layout == 2
    saver.load(found, {"model.w": (target := torch.zeros(3, 4))})
    assert torch.equal(target, weight)
    content = bytearray((folder / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(content)
    with pytest.raises(Damaged, match="^rank-00000.safetensors has other bytes than were written$"):
        inspect(saver.storage, "step-3", Ranks())


def test_what_crc32_always_finds():
    """One or two bits anywhere, any bits within 32 of one another, and stretches in another order."""
    n_bits = 8 * 24
    content = random.Random(1).getrandbits(n_bits)
    sums = crc32(content.to_bytes(24))
    flips = [1 << a | 1 << b for a in range(n_bits) for b in range(a + 1)]
    draw = random.Random(2)
    bursts = [(draw.getrandbits(32) | 1) << at for at in range(n_bits - 32) for _ in range(20)]
    assert all(crc32((content ^ flip).to_bytes(24)) != sums for flip in [*flips, *bursts])
    first, second = bytes(STRETCH), bytes([1]) * STRETCH
    assert crc32(first + second) != crc32(second + first)


def test_cores_are_counted_where_a_process_cannot_be_kept_to_some(monkeypatch):
    assert 1 <= n_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert n_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert n_cores() == 1
