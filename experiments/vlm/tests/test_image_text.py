"""Rows of images and captions: the same from every kind of file, patches no labels, mistakes named."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from core.config.errors import UserError
from core.data.packing import IGNORE
from core.data.tokenizer import Tokenizer
from vlm.image_text import ImageText
from vlm.shapes import drawn_pair


def stored_pairs(folder: Path, n: int) -> tuple[Path, Path]:
    """The same pairs as a Parquet file of several groups, and as a folder."""
    images = folder / "images"
    images.mkdir()
    rows, lines = [], []
    for number in range(n):
        picture, text = drawn_pair(number, 32)
        Image.fromarray(picture).save(images / f"{number}.png")
        rows.append({"image": {"bytes": (images / f"{number}.png").read_bytes(), "path": None}, "text": text})
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=4)
    return folder / "pairs.parquet", images


def opened(*words: Path | str, split: Any = "train", **more: Any) -> ImageText:
    data = {"image_size": 32, "n_patches": 16, "held_out_pairs": 3, "n_shapes": 13} | more
    config = ImageText.Config(dataset=list(map(str, words)), **data)
    return config.build(tokenizer=Tokenizer.Config().build(), seq_len=40, seed=1, split=split)


def test_rows_are_the_same_from_files_folders_and_drawn(tmp_path: Path) -> None:
    file, folder = stored_pairs(tmp_path, 13)
    for split, n in (("train", 25), ("validation", 3)):
        drawn, *others = (opened(word, split=split) for word in ("shapes", file, folder, tmp_path))
        batch = drawn.read(0, n)
        for other in others:
            found = other.read(0, n)
            assert torch.equal(found.inputs["pixels_BCSS"], batch.inputs["pixels_BCSS"])
            assert all(torch.equal(a, b) for a, b in zip(found[:4], batch[:4], strict=True))
            single = other.read(2, 1)
            assert torch.equal(single.inputs["pixels_BCSS"][0], batch.inputs["pixels_BCSS"][2])
    assert len({opened(word).fingerprint for word in ("shapes", file, folder)}) == 3
    both = opened(folder, file, held_out_pairs=0)
    assert both.rows_per_epoch == 26 and both.pairs.pair(13, 32)[1] == drawn_pair(0, 32)[1]


def test_patches_are_no_labels_and_a_caption_is_one(tmp_path: Path) -> None:
    rows = opened("shapes")
    batch = rows.read(0, 10)
    assert (batch.tokens_BL[:, :16] == 0).all() and batch.inputs["is_patch_BL"].sum(1).tolist() == [16] * 10
    assert (batch.labels_BL[:, :15] == IGNORE).all()
    texts = [drawn_pair(int(number), 32)[1] for number in rows.numbers(0, 10)]
    for labels_L, text in zip(batch.labels_BL, texts, strict=True):
        ids = [each for each in labels_L.tolist() if each != IGNORE]
        assert ids == [*rows.tokenizer.encode(text), rows.tokenizer.eos_id] and labels_L[15] == ids[0]
    pixels = batch.inputs["pixels_BCSS"]
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.std() > 0.2


def test_mistakes_are_named(tmp_path: Path) -> None:
    file, folder = stored_pairs(tmp_path, 5)
    for words, more, told in (
        (["nowhere"], {}, "nowhere is no .parquet file, and no folder with such or with a metadata.jsonl"),
        ([file], {"text_column": "caption"}, "has no column caption: it has image, text"),
        ([file], {"held_out_pairs": 5}, "held_out_pairs 5 leaves nothing of 5 pairs"),
        (["shapes"], {"n_patches": 40}, "seq_len 40 has no room for a caption behind 40 patches"),
        (["shapes"], {"n_patches": 38}, "tokens, and a row of 40 has 3 behind 38 patches: raise training.seq_len"),
    ):
        with pytest.raises(UserError, match=told):
            opened(*words, **more).read(0, 1)
    (folder / "1.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"1\.png: not an image"):
        opened(folder).pairs.pair(1, 32)
    (folder / "metadata.jsonl").write_text('{"file_name": "../pairs.parquet", "text": "a"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: there is no file '\.\./pairs\.parquet' in the folder"):
        opened(folder, held_out_pairs=0)
