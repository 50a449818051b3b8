"""What is written for the weights of a model: each stored tensor with how to make it out of our weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from core.weights.files import Output
from core.weights.hf_model import StoredModel
from core.weights.key_map import KeyMap, KeyPart

Read = Callable[[str, int | None], Tensor]
"""The name of one of our weights, or one row of it."""


def dtypes(
    model: StoredModel, key_map: KeyMap, stored: Mapping[str, torch.dtype], cast: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The types to write our weights in: `cast`, or else as they are `stored`; a buffer keeps the model's type."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: (cast or dtype) if name in parameters else key_map.weights[name].dtype for name, dtype in stored.items()
    }


def outputs(key_map: KeyMap, dtypes: Mapping[str, torch.dtype], read: Read) -> list[Output]:
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
        made.append(Output(key, shape, dtype, partial(gather_stored, shape, dtype, ours, read)))
    return made


@torch.no_grad()
def gather_stored(shape: list[int], dtype: torch.dtype, ours: Iterable[tuple[str, KeyPart]], read: Read) -> Tensor:
    """A new tensor as it is stored, with the values of these our weights."""
    stored = torch.empty(shape, dtype=dtype)
    for name, piece in ours:
        view = piece.view(stored if piece.stored_row is None else stored[piece.stored_row])
        view.copy_(read(name, piece.row).reshape(view.shape))
    return stored
