"""What is written for the weights of a model: each stored tensor with how to make it out of our weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from core.weights.hf_model import StoredModel
from core.weights.key_map import KeyMap, KeyPart
from core.weights.shard_file import FileSpan, Output, RowSpan, stretches

Read = Callable[[str, RowSpan], Tensor]
"""The values of one of our weights, by its name, or of rows of it."""
Locate = Callable[[str, torch.dtype], FileSpan | None]
"""Where the values of one of our weights, by its name, stand in this type; None where they must be read."""


def dtypes(
    model: StoredModel, key_map: KeyMap, stored: Mapping[str, torch.dtype], cast: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The types to write our weights in: `cast`, or else as they are `stored`; a buffer keeps the model's type."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: (cast or dtype) if name in parameters else key_map.weights[name].dtype for name, dtype in stored.items()
    }


def nowhere(name: str, dtype: torch.dtype) -> None:
    """Weights that stand in no file."""


def outputs(key_map: KeyMap, dtypes: Mapping[str, torch.dtype], read: Read, locate: Locate = nowhere) -> list[Output]:
    """The tensors to write, one after another in the order of our weights, each in the type of the first of ours that
    is in it."""
    parts: dict[str, list[tuple[str, KeyPart]]] = {}
    for name in dtypes:
        for piece in key_map.places[name][0]:
            parts.setdefault(piece.key, []).append((name, piece))
    parts |= {key: [(name, KeyPart(key))] for key, name in key_map.copies.items()}
    made = []
    for key, ours in parts.items():
        name, piece = ours[0]
        shape, dtype = piece.stored_shape(key_map.weights[name].shape), dtypes[name]
        made.append(Output(key, shape, dtype, partial(stored_stretches, shape, dtype, ours, read, locate)))
    return made


@torch.no_grad()
def stored_stretches(
    shape: list[int], dtype: torch.dtype, ours: list[tuple[str, KeyPart]], read: Read, locate: Locate
) -> Iterator[Tensor | FileSpan]:
    """The values of a tensor as it is stored, row after row where ours are stored as they are or row by row."""
    (name, piece), *more = ours
    is_plain = not more and piece == KeyPart(piece.key)
    if is_plain and (found := locate(name, dtype)) is not None:
        yield found
    elif not more and shape and piece == KeyPart(piece.key, head_dim=piece.head_dim):
        for rows in stretches(shape, dtype, piece.head_dim or 1):
            stored = torch.empty((rows.stop - rows.start, *shape[1:]), dtype=dtype)
            view = piece.view(stored)
            view.copy_(read(name, rows).reshape(view.shape))
            yield stored
    elif piece.stored_row is not None:
        for row in range(shape[0]):
            mine = [(name, piece._replace(stored_row=None)) for name, piece in ours if piece.stored_row == row]
            yield gather_stored(shape[1:], dtype, mine, read)
    else:
        yield gather_stored(shape, dtype, ours, read)


@torch.no_grad()
def gather_stored(shape: list[int], dtype: torch.dtype, ours: Iterable[tuple[str, KeyPart]], read: Read) -> Tensor:
    """A new tensor as it is stored, with the values of these our weights."""
    stored = torch.empty(shape, dtype=dtype)
    for name, piece in ours:
        view = piece.view(stored if piece.stored_row is None else stored[piece.stored_row])
        view.copy_(read(name, piece.row).reshape(view.shape))
    return stored
