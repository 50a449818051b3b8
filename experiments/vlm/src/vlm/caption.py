"""Captions that a run writes for images: python -m vlm.caption RUN IMAGE ...

Letters: B images, L length, C channels, S pixels of a side.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.recipe import load_config
from core.generate.cache import CachedDecoder
from core.generate.generate import generate
from core.generate.sample import Sampler
from core.nn.init import materialise
from core.runtime.meta import meta_model
from core.weights.folder import load_weights
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
    model: Any = meta_model(config.model)
    materialise(model, torch.device("cpu"), torch.float32)
    load_weights(model, folder)
    return config, model.eval()


class CachedSeer(CachedDecoder):
    """A model that reads the patches of an image (B, C, S, S) first, and then its caption."""

    def __init__(self, model: Any, pixels_BCSS: Tensor, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.pixels_BCSS = pixels_BCSS

    def __call__(self, tokens_BL: Tensor, **inputs: Tensor) -> Tensor:
        if self.length == 0:
            is_patch_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
            inputs |= {"pixels_BCSS": self.pixels_BCSS, "is_patch_BL": is_patch_BL}
        return super().__call__(tokens_BL, **inputs)


def captions(model: Any, pixels_BCSS: Tensor, *, limit: int, end_id: int | None) -> list[list[int]]:
    """The likeliest tokens behind each image, up to `limit` of them, or the token that ends a caption."""
    n = len(pixels_BCSS)
    found = generate(
        model,
        [[PLACEHOLDER] * model.config.vision.n_patches] * n,
        Sampler(n, temperature=0),
        limits=[limit] * n,
        n_tokens=model.config.vocab_size,
        end_ids=[] if end_id is None else [end_id],
        reader=partial(CachedSeer, pixels_BCSS=pixels_BCSS),
    )
    return [each.ids for each in found]


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
