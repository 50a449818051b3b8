"""Captions that a run writes for images: python -m vlm.caption RUN IMAGE ...

Letters: B images, L length, C channels, S pixels of a side.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.recipe import load_config
from core.generate.cache import CachedDecoder
from core.nn.init import materialise
from core.runtime.meta import meta_model
from core.weights.hf import load_from
from core.weights.key_map import own_key_map
from core.weights.saved import newest
from core.weights.source import WeightSource
from vlm import configs
from vlm.image_text import PLACEHOLDER, pixels
from vlm.pairs import decoded
from vlm.trainer import VLMTrainer


def saved_model(folder: Path) -> tuple[VLMTrainer.Config, Any]:
    """The configuration of a run, and its model as it was saved last, in evaluation mode. Raises `UserError` for a
    folder of another kind."""
    config: Any = load_config([str(folder)], configs)
    if not isinstance(config, VLMTrainer.Config):
        raise UserError(f"{folder} is no run of vlm")
    model = meta_model(config.model)
    materialise(model, torch.device("cpu"), torch.float32)
    load_from(WeightSource(own_key_map(model), newest(folder)))
    return config, model.eval()


@torch.inference_mode()
def captions(model: Any, pixels_BCSS: Tensor, *, limit: int, end_id: int | None) -> list[list[int]]:
    """The likeliest tokens behind each image, up to `limit` of them, or the token that ends a caption."""
    n, n_patches = len(pixels_BCSS), model.config.vision.n_patches
    tokens_BL = torch.full((n, n_patches), PLACEHOLDER)
    found: list[list[int]] = [[] for _ in range(n)]
    going = set(range(n))
    with CachedDecoder(model, n_pads=[0] * n, capacity=n_patches + limit) as cached:
        inputs = {"pixels_BCSS": pixels_BCSS, "is_patch_BL": torch.ones(n, n_patches, dtype=torch.bool)}
        while going:
            tokens_BL = cached(tokens_BL, **inputs).argmax(-1, keepdim=True)
            inputs = {}
            for row in sorted(going):
                token = int(tokens_BL[row])
                found[row] += [token] * (token != end_id)
                if token == end_id or len(found[row]) == limit:
                    going.remove(row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a mistake of the user ends the program with code 2."""
    parser = argparse.ArgumentParser(description="Write a caption for each image.")
    parser.add_argument("run", type=Path, help="the folder of a run that has saved a checkpoint")
    parser.add_argument("images", type=Path, nargs="+", help="files of images")
    asked = parser.parse_args(argv)
    with exit_plainly():
        config, model = saved_model(asked.run)
        size, tokenizer = config.dataloader.image_size, config.tokenizer.build()
        pictures = np.stack([decoded(content_of(file), size, file) for file in asked.images])
        limit = config.training.seq_len - config.dataloader.n_patches
        found = captions(model, pixels(pictures), limit=limit, end_id=tokenizer.eos_id)
        for file, ids in zip(asked.images, found, strict=True):
            print(f"{file}: {tokenizer.decode(ids)}", flush=True)


def content_of(file: Path) -> bytes:
    """The bytes of a file. Raises `UserError` where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the image {file}: {error.strerror}") from error


if __name__ == "__main__":
    main()
