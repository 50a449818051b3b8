"""The hash of a file, as it is written and as it is read, against SHA-256 of stretches by hand."""

import hashlib
import random

import pytest

from core.checkpoint import storage as storage_module
from core.checkpoint import tree_hash
from core.checkpoint.manifest import Written, file_problems
from core.checkpoint.storage import Storage

LEAF = 100


@pytest.fixture(autouse=True)
def short_leaves(monkeypatch):
    for module in (tree_hash, storage_module):
        monkeypatch.setattr(module, "LEAF_BYTES", LEAF)
    monkeypatch.setattr(storage_module, "HASHED_BYTES", 32)


def by_hand(content):
    leaves = [hashlib.sha256(content[at : at + LEAF]).digest() for at in range(0, len(content), LEAF)]
    return hashlib.sha256(b"".join(leaves) if len(content) > LEAF else content).hexdigest()


@pytest.mark.parametrize("place", ["here", "memory://there"])
@pytest.mark.parametrize("n_bytes", [0, 1, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF, 5 * LEAF + 7])
def test_written_and_read_by_threads_it_is_the_same(tmp_path, n_bytes, place):
    draw = random.Random(n_bytes)
    storage = Storage(tmp_path if place == "here" else f"{place}{n_bytes}")
    content = draw.randbytes(n_bytes)
    with storage.create("file") as file:
        rest = content
        while rest:
            size = draw.randrange(1, 2 * LEAF)
            file.write(rest[:size])
            rest = rest[size:]
    assert file.hex() == storage.digest("file") == by_hand(content)


def test_layout_1_has_the_plain_hash(tmp_path):
    (tmp_path / "file").write_bytes(content := bytes(3 * LEAF))
    plain = {"file": Written(len(content), hashlib.sha256(content).hexdigest())}
    tree = {"file": Written(len(content), by_hand(content))}
    storage = Storage(tmp_path)
    assert file_problems(storage, ".", plain, layout=1) == file_problems(storage, ".", tree) == []
    wrong = ["file has other bytes than were written"]
    assert file_problems(storage, ".", plain) == file_problems(storage, ".", tree, layout=1) == wrong
