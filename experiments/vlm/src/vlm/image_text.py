"""Rows of one image and its caption each.

Letters: B rows, L length, C channels, S pixels of a side, P patches of an image.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config.errors import UserError
from core.config.record import absolute
from core.data.packing import Batch, pack_rows
from core.data.samples import IndexedSamples
from vlm.pairs import SHAPES, open_pairs
from vlm.vision import CHANNELS

PLACEHOLDER = 0
"""The id that stands where patches are; it is never looked at."""


def pixels(pictures: np.ndarray) -> Tensor:
    """Pictures (B, S, S, C) uint8 as a tower reads them: (B, C, S, S), from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


class ImageText(IndexedSamples):
    """Row i is the patches of an image, its caption and an end: one document, padded. What is learned is the caption;
    patches are no labels.

    Beside its tokens a row has `pixels_BCSS` (B, C, S, S), from -1 to 1 as SigLIP wants them, and `is_patch_BL` (B, L).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedSamples.Config):
        dataset: list[str] = field(default_factory=lambda: [SHAPES])
        """.parquet files, folders of such, folders with images and a metadata.jsonl; "shapes" is drawn."""
        image_column: str = "image"
        """Column of a Parquet file with the bytes of images."""
        text_column: str = "text"
        """Column, or key in metadata.jsonl, with captions."""
        image_size: int = 224
        """Pixels of a side that images are resized to; that of the tower."""
        n_patches: int = 196
        """Places of a row that an image takes; that of the tower."""
        n_shapes: int = 20_000
        """Pairs that "shapes" draws."""
        held_out_pairs: int = 256
        """Pairs at the end that are kept for validation."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            for name in ("image_size", "n_patches", "n_shapes"):
                if getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be at least 1"
            if self.held_out_pairs < 0:
                yield "held_out_pairs", f"held_out_pairs {self.held_out_pairs} must not be negative"
            if not self.dataset:
                yield "dataset", "dataset is empty: name a .parquet file, a folder, or shapes"

        def validation_problems(self) -> Iterator[tuple[str, str]]:
            if not self.held_out_pairs:
                yield "held_out_pairs", "held_out_pairs 0 leaves a validator nothing: raise it, or leave validator off"

        def places(self) -> dict[str, Any]:
            return {"dataset": [word if word == SHAPES else absolute(word) for word in self.dataset]}

        def inputs(self, n_rows: int, seq_len: int) -> dict[str, Tensor]:
            return {
                "pixels_BCSS": torch.zeros(n_rows, CHANNELS, self.image_size, self.image_size),
                "is_patch_BL": torch.zeros(n_rows, seq_len, dtype=torch.bool),
            }

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        c = self.config
        self.pairs = open_pairs(c.dataset, c.image_column, c.text_column, c.n_shapes)
        n, held_out = len(self.pairs), c.held_out_pairs
        if held_out >= n:
            raise UserError(f"dataloader.held_out_pairs {held_out} leaves nothing of {n:,} pairs: lower it")
        room = self.seq_len - c.n_patches
        if room < 1:
            raise UserError(
                f"training.seq_len {self.seq_len} has no room for a caption behind {c.n_patches} patches: raise it"
            )
        self.first = n - held_out if self.split == "validation" else 0
        self.rows_per_epoch = held_out if self.split == "validation" else n - held_out
        self.description = f"{', '.join(c.dataset)}: {n:,} images with captions ({self.split})"
        told = f"{self.pairs.fingerprint} {self.tokenizer.fingerprint} {c.image_size} {c.n_patches} {held_out}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def rows_at(self, numbers: np.ndarray) -> Batch:
        n, shape = self.config.n_patches, (len(numbers), self.seq_len + 1)
        windows = np.full(shape, PLACEHOLDER, np.int64)
        starts, filled, counts = (np.zeros(shape, bool) for _ in range(3))
        pictures = np.zeros((len(numbers), self.config.image_size, self.config.image_size, CHANNELS), np.uint8)
        for row, number in enumerate(numbers.tolist()):
            pictures[row], text = self.pairs.pair(self.first + number, self.config.image_size)
            ids = self.caption_ids(text, number)
            windows[row, n : n + len(ids)] = ids
            counts[row, n : n + len(ids)] = True
            filled[row, : n + len(ids)] = True
        starts[:, 0] = True
        is_patch_BL = torch.zeros(len(numbers), self.seq_len, dtype=torch.bool)
        is_patch_BL[:, :n] = True
        batch = pack_rows(windows, starts, filled, counts)
        return batch._replace(inputs={"pixels_BCSS": pixels(pictures), "is_patch_BL": is_patch_BL})

    def caption_ids(self, text: str, number: int) -> list[int]:
        """The ids of a caption and of its end. Raises `UserError` where a row has no room for them."""
        ids = self.tokenizer.encode(text)
        if self.tokenizer.eos_id is not None:
            ids = [*ids, self.tokenizer.eos_id]
        if len(ids) > (room := self.seq_len + 1 - self.config.n_patches):
            raise UserError(
                f"the caption of pair {self.first + number + 1:,} has {len(ids)} tokens, and a row of "
                f"{self.seq_len} has {room} behind {self.config.n_patches} patches: raise training.seq_len"
            )
        return ids
