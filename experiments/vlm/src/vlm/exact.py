"""How many captions of a run's held-out images are exact: python -m vlm.exact RUN.

Letters: B rows, L length, V vocabulary.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config.exit import exit_plainly
from core.data.packing import IGNORE, Batch
from core.data.samples import Samples
from vlm.caption import saved_model

ROWS = 32
"""Rows of a forward."""


@torch.no_grad()
def exact_rows(model: nn.Module, batch: Batch) -> Tensor:
    """For each row whether the model writes its caption by itself, (B,): the likeliest token is the caption's at every
    place. (As long as it is, what has been written is what the row has, so that one forward says it.)"""
    logits_BLV = model(batch.tokens_BL, **batch.inputs)
    right_BL = logits_BLV.argmax(-1) == batch.labels_BL
    return (right_BL | (batch.labels_BL == IGNORE)).all(1)


def count_exact(model: nn.Module, rows: Samples) -> tuple[int, int]:
    """The exact captions among all rows of a set that has an end, and their number."""
    assert rows.n_rows is not None, "a set without an end cannot be counted"
    starts = range(0, rows.n_rows, ROWS)
    batches = (rows.read(first, min(ROWS, rows.n_rows - first)) for first in starts)
    return sum(int(exact_rows(model, batch).sum()) for batch in batches), rows.n_rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a mistake of the user ends the program with code 2."""
    parser = argparse.ArgumentParser(description="Count the exact captions of held-out images.")
    parser.add_argument("run", type=Path, help="the folder of a run that has saved a checkpoint")
    asked = parser.parse_args(argv)
    with exit_plainly():
        config, model = saved_model(asked.run)
        sizes = {"seq_len": config.training.seq_len, "seed": config.debug.seed}
        rows = config.dataloader.build(tokenizer=config.tokenizer.build(), split="validation", **sizes)
        right, n = count_exact(model, rows)
        print(f"{right} of {n} captions are exact ({right / n:.1%})", flush=True)


if __name__ == "__main__":
    main()
