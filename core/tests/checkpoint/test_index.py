"""The index of a checkpoint: one whose pieces do not fit their tensors, their files or one another is refused, whatever
vouches for it."""

import json
import os
import random
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.find import Found, inspect
from core.checkpoint.index import tiles
from core.checkpoint.manifest import Damaged, Progress, manifest_digest
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage
from core.config.errors import UserError
from core.runtime.ranks import Ranks

WEIGHTS = {"model.a": torch.arange(12.0).reshape(3, 4), "model.b": torch.arange(5, dtype=torch.int64)}
RANK = "rank-00000.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two tensors."""
    settings = Checkpoint(enable=True, folder=str(tmp_path))
    saver = Saver(settings, Ranks(), run_folder=tmp_path, config="{}", export=lambda found, path: None)
    saver.save(Progress(step=3), WEIGHTS, kind="full", wait=True)
    return tmp_path / "step-3"


def found(checkpoint: Path) -> Found:
    return inspect(Storage(checkpoint.parent), checkpoint.name, Ranks())


def vouch(checkpoint: Path) -> None:
    """Have the manifest say of all files what they are now."""
    storage = Storage(checkpoint)
    said = json.loads((checkpoint / "manifest.json").read_text())
    del said["digest"]
    for name in said["files"]:
        said["files"][name] = {"n_bytes": storage.size(name), "crc32": storage.sums(name)}
    (checkpoint / "manifest.json").write_text(json.dumps({**said, "digest": manifest_digest(said)}))


def forge(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Change the index, and have the manifest vouch for it."""
    index = json.loads((checkpoint / "tensors.json").read_text())
    change(index)
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    vouch(checkpoint)


def set_at(where: str, value: Any) -> Callable[[Any], object]:
    """A change of one value of the entry of `model.a`; a piece's begins with `piece.`."""

    def change(index: Any) -> None:
        entry = index["model.a"]
        target = entry["pieces"][0] if where.startswith("piece.") else entry
        target[where.removeprefix("piece.")] = value

    return change


def test_a_checkpoint_that_nobody_touched_is_whole(checkpoint: Path) -> None:
    index = found(checkpoint).tensors()
    assert {name: stored.shape for name, stored in index.items()} == {"model.a": (3, 4), "model.b": (5,)}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("dtype", "F16", "has model.a@0,0 as .'dtype': 'F32'.*tensors.json as .'dtype': 'F16'"),
        ("dtype", "I32", "rank-00000.safetensors has model.a@0,0 as {'dtype': 'F32'.*tensors.json as {'dtype': 'I32'"),
        ("dtype", "F8", "tensors.json: model.a: dtype 'F8' is none of F64"),
        ("dtype", 4, "model.a: dtype: expected str, got 4"),
        ("shape", [4, 3], "model.a: its pieces do not make up a tensor of shape \\[4, 3\\]"),
        ("shape", [3, 4, 1], "model.a: its pieces do not make up"),
        ("shape", [-3, -4], "model.a: \\[-3, -4\\] is no shape"),
        ("shape", [2**63, 0], "this one has 64 bits"),
        ("shape", [2**62, 2**62], "do not make up"),
        ("shape", "34", "model.a: shape: expected list"),
        ("shape", [3.0, 4], "model.a: shape: 0: expected int, got 3.0"),
        ("pieces", [], "do not make up"),
        ("pieces", {}, "model.a: pieces: expected list"),
        ("piece.at", -1, "bytes -1 to 47 are not in rank"),
        ("piece.at", 0, "bytes 0 to 48 are not in rank"),
        ("piece.at", 2**70, "this one has 71 bits"),
        ("piece.at", 1.0, "model.a: at: expected int"),
        ("piece.shape", [3, 5], "do not make up"),
        ("piece.shape", [4, 3], "do not make up"),
        ("piece.shape", [-3, -4], "do not make up"),
        ("piece.start", [0], "do not make up"),
        ("piece.start", [0, 1], "do not make up"),
        ("piece.start", [0, -1], "do not make up"),
        ("piece.file", "tensors.json", "tensors.json has no header"),
        ("piece.file", "../step-3/" + RANK, "is no file of this checkpoint"),
        ("piece.file", "manifest.json", "'manifest.json' is no file of this checkpoint"),
        ("piece.file", None, "model.a: file: expected str"),
        ("piece.more", 1, "model.a: more is unknown"),
        ("more", 1, "model.a: more is unknown"),
    ],
)
def test_an_entry_that_was_forged(checkpoint: Path, where: str, value: Any, words: str) -> None:
    forge(checkpoint, set_at(where, value))
    with pytest.raises(Damaged, match=words):
        found(checkpoint)


def test_tensors_that_share_bytes(checkpoint: Path) -> None:
    def change(index: Any) -> None:
        index["model.a"]["pieces"][0]["at"] = index["model.b"]["pieces"][0]["at"] - 8

    forge(checkpoint, change)
    with pytest.raises(Damaged, match=f"model.* and model.* share bytes of {RANK}"):
        found(checkpoint)


def test_tensors_that_changed_places(checkpoint: Path) -> None:
    """All sizes and bounds hold: what the file says of itself tells."""

    def change(index: Any) -> None:
        index["model.c"] = index.pop("model.a")

    forge(checkpoint, change)
    with pytest.raises(Damaged, match=f"{RANK} has model.a@0,0 as .*, tensors.json as nothing"):
        found(checkpoint)


def test_a_tensor_that_the_index_leaves_out(checkpoint: Path) -> None:
    forge(checkpoint, lambda index: index.pop("model.b"))
    with pytest.raises(Damaged, match="has model.b@0 as .*, tensors.json as nothing"):
        found(checkpoint)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"model.a": 1}', b'{"model.a": {}}', b'{"a":' * 9999])
def test_an_index_that_is_none(checkpoint: Path, text: bytes) -> None:
    (checkpoint / "tensors.json").write_bytes(text)
    vouch(checkpoint)
    with pytest.raises(Damaged, match="^tensors.json"):
        found(checkpoint)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_a_file_whose_header_has_another_length(checkpoint: Path, length: int) -> None:
    data = (checkpoint / RANK).read_bytes()
    (checkpoint / RANK).write_bytes(struct.pack("<Q", length) + data[8:])
    vouch(checkpoint)
    with pytest.raises(Damaged, match=f"^{RANK}"):
        found(checkpoint)


def test_a_file_that_is_a_pipe(checkpoint: Path) -> None:
    (checkpoint / RANK).unlink()
    os.mkfifo(checkpoint / RANK)
    with pytest.raises(Damaged, match=f"{RANK} cannot be read: it is no regular file"):
        found(checkpoint)


def test_numbers_of_another_kind_are_not_loaded(checkpoint: Path) -> None:
    """Bits of a float that are taken for a whole number, in the index and in the file."""
    data = (checkpoint / RANK).read_bytes().replace(b'"F32"', b'"I32"')
    (checkpoint / RANK).write_bytes(data)
    forge(checkpoint, set_at("dtype", "I32"))
    settings = Checkpoint(enable=True, folder=str(checkpoint.parent))
    saver = Saver(settings, Ranks(), run_folder=checkpoint, config="{}", export=lambda found, path: None)
    with pytest.raises(UserError, match="model.a is stored as I32, here it is F32"):
        saver.load(found(checkpoint), {"model.a": torch.zeros(3, 4)})


# Pieces that make up a tensor


def covered_once(boxes: list[tuple[list[int], list[int]]], shape: list[int]) -> bool:
    """Whether every element is in one box, and no box has others: by counting."""
    counts = dict.fromkeys(product(*map(range, shape)), 0)
    for start, size in boxes:
        for index in product(*(range(first, first + n) for first, n in zip(start, size, strict=True))):
            if index not in counts:
                return False
            counts[index] += 1
    return all(count == 1 for count in counts.values())


def test_boxes_that_tile_a_shape_are_those_that_cover_it_once() -> None:
    draw = random.Random(1)
    n_tiled = 0
    for _ in range(3000):
        shape = [draw.randrange(1, 5) for _ in range(draw.randrange(1, 4))]
        cuts = [sorted({0, size, *(draw.randrange(size + 1) for _ in range(2))}) for size in shape]
        sides = [list(zip(cut[:-1], cut[1:], strict=True)) for cut in cuts]
        boxes = [([a for a, _ in cell], [b - a for a, b in cell]) for cell in product(*sides)]
        change = draw.randrange(4)
        if change == 0:
            boxes.pop(draw.randrange(len(boxes)))
        elif change == 1:
            boxes.append(draw.choice(boxes))
        elif change == 2:
            start, size = draw.choice(boxes)
            draw.choice([start, size])[draw.randrange(len(shape))] += draw.choice([-1, 1])
        draw.shuffle(boxes)
        expected = covered_once(boxes, shape)
        assert tiles(boxes, shape) == expected, (boxes, shape)
        n_tiled += expected
    assert 700 < n_tiled < 2000


def test_a_number_and_nothing_are_tiled() -> None:
    assert tiles([([], [])], []) and not tiles([], []) and not tiles([([], []), ([], [])], [])
    assert tiles([], [0, 4]) and tiles([([0, 0], [0, 4])], [0, 4]) and not tiles([([0, 0], [1, 4])], [0, 4])
