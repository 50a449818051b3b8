"""Windows of a token stream become training samples; everything a model must know of documents is derived here.

Letters: B samples, L tokens of a sample (the sequence length).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
PADDING = -1
"""The number of the document that padding is."""
NO_INPUTS: Mapping[str, Tensor] = MappingProxyType({})
"""Of a model that reads tokens alone."""


class Batch(NamedTuple):
    """Samples side by side, each cut from the token stream; the first four tensors are int64 of shape (B, L).

    For the stream `a b | c d e | f` (documents divided by bars) and L = 5:

        tokens_BL       a  b  c  d  e
        labels_BL       b  -  d  e  -      the next token; - is IGNORE, where the next token opens another document
        positions_BL    0  1  0  1  2      restart with each document
        documents_BL    0  0  1  1  1      number of the document within its row: only equal numbers may see each other

    A sample that begins inside a document counts positions from its own first token, so they stay below L. What fills
    up a row behind its documents is the document PADDING, and counts nowhere.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    positions_BL: Tensor
    documents_BL: Tensor
    inputs: Mapping[str, Tensor] = NO_INPUTS
    """What the model reads beside tokens, by the names of arguments of its forward: tensors (B, ...) of any type."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with each of its tensors changed, (B, ...) each, those of `inputs` too."""
        inputs = {name: change(value) for name, value in self.inputs.items()}
        return Batch(*map(change, self[:4]), inputs=inputs)  # pyrefly: ignore[bad-argument-type] - four tensors

    def rows(self, first: int, end: int) -> "Batch":
        """Its rows from `first` to before `end`."""
        return self.map(lambda part: part[first:end])

    def padding_BL(self) -> Tensor | None:
        """Which tokens are padding; None where none are."""
        padding_BL = self.documents_BL == PADDING
        return padding_BL if padding_BL.any() else None


def joined_batches(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches, one behind the other. Raises `TypeError` where their `inputs` have other names."""
    names = {tuple(sorted(batch.inputs)) for batch in batches}
    if len(names) > 1:
        raise TypeError(f"rows with other inputs beside their tokens cannot be mixed: {sorted(names)}")
    tokens = (torch.cat(parts) for parts in zip(*(batch[:4] for batch in batches), strict=True))
    return Batch(*tokens, inputs={name: torch.cat([batch.inputs[name] for batch in batches]) for name in names.pop()})


def count_labels(labels: Tensor) -> int:
    """How many labels, of any shape, count for the loss."""
    return int((labels != IGNORE).sum())


def pack_rows(
    windows: np.ndarray, starts: np.ndarray, filled: np.ndarray | None = None, counts: np.ndarray | None = None
) -> Batch:
    """The samples of `windows`: (B, L+1) tokens, with `starts` (B, L+1) true where a token opens a document.

    Only the tokens of `filled` (B, L+1) are no padding, and of these only those of `counts` (B, L+1) are labels; None
    says all.
    """
    opens_BL = starts[:, :-1].copy()
    opens_BL[:, :1] = False
    column_L = np.arange(opens_BL.shape[1])
    opened_at_BL = np.maximum.accumulate(np.where(opens_BL, column_L, 0), axis=1)
    left_out_BL, documents_BL = starts[:, 1:], np.cumsum(opens_BL, axis=1, dtype=np.int64)
    for chosen in (filled, counts):
        left_out_BL = left_out_BL if chosen is None else left_out_BL | ~chosen[:, 1:]
    if filled is not None:
        documents_BL = np.where(filled[:, :-1], documents_BL, PADDING)
    labels_BL = np.where(left_out_BL, IGNORE, windows[:, 1:].astype(np.int64))
    return Batch(
        tokens_BL=torch.from_numpy(windows[:, :-1].astype(np.int64)),
        labels_BL=torch.from_numpy(labels_BL),
        positions_BL=torch.from_numpy(column_L - opened_at_BL),
        documents_BL=torch.from_numpy(documents_BL),
    )
