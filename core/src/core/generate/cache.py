"""What a model has computed of a text, kept, so that one token more costs one token.

Letters: B rows, L length of what is new, M length of all so far, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.nn.kernel import KeyValues, Positions
from core.runtime.device import free_memory
from core.runtime.units import size_text


class Memory:
    """The key side of one attention: a hook for its `KeyValues` that adds what is new and returns all so far.

    Each side (B, L, ..., H) lies in a buffer with room for `capacity` tokens in a row. There the tokens of a head stand
    next to each other, (B, ..., M, H), because attention reads head by head.
    """

    def __init__(self, capacity: int, n_alike: int = 0) -> None:
        """The first of `n_alike` attentions looks whether there is room for all of them, before it makes its own."""
        self.capacity, self.n_alike = capacity, n_alike
        self.length = 0
        self.sides: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.sides:
            if self.n_alike:
                check_room(new, self.capacity, self.n_alike)
            self.sides = [self.buffer(side) for side in new]
        start, n_new = self.length, new[0].shape[1]
        self.length += n_new
        for kept, side in zip(self.sides, new, strict=True):
            kept.narrow(1, start, n_new).copy_(side)
        return tuple(kept.narrow(1, 0, self.length) for kept in self.sides)

    def buffer(self, side: Tensor) -> Tensor:
        """Room for all that a side will be, (B, capacity, ..., H)."""
        n_rows, _, *heads, width = side.shape
        return side.new_empty(n_rows, *heads, self.capacity, width).movedim(-2, 1)


def check_room(sides: Sequence[Tensor], capacity: int, n_layers: int) -> None:
    """Raise `UserError` where keys and values like these, (B, L, ..., H), of `capacity` tokens a row and so many layers
    do not fit into memory."""
    n_rows, device = len(sides[0]), sides[0].device
    n_bytes = n_layers * sum(side[:, :1].numel() * side.itemsize for side in sides) * capacity
    if (free := free_memory(device)) is not None and n_bytes > free:
        raise UserError(
            f"what is kept of {n_rows:,} x {capacity:,} tokens takes {size_text(n_bytes)} in "
            f"{str(sides[0].dtype).removeprefix('torch.')}, {device} has {size_text(free)} left: continue fewer or "
            "shorter prompts at once, or by fewer tokens"
        )


class CachedReader(Protocol):
    """Makes of a model what reads a batch of texts piece by piece, as `CachedDecoder` does."""

    def __call__(
        self, model: Any, *, n_pads: Sequence[int], capacity: int
    ) -> AbstractContextManager[Callable[[Tensor], Tensor]]: ...


class CachedDecoder:
    """A model that reads a batch of texts piece by piece: inside `with`, a call takes the tokens (B, L) that follow in
    each row, and returns the logits (B, V) of the token after them, as the model returns them for the whole row.

    Row b begins with `n_pads[b]` tokens that are no text. They are another document, so no token of the text sees them,
    and positions count from the text:

        n_pads 2, 0      tokens  . . a b | c        positions  -2 -1 0 1 | 2
                                 d e f g | h                    0  1 2 3 | 4

    All keys are kept, also those that a window has left behind: the mask hides them.
    """

    def __init__(self, model: Decoder, *, n_pads: Sequence[int], capacity: int) -> None:
        assert not model.training, "a model in training predicts further tokens and counts its experts' loads"
        self.model, self.capacity = model, capacity
        self.length = 0
        device = next(model.parameters()).device
        self.n_pads_B1 = torch.tensor(n_pads, device=device)[:, None] if any(n_pads) else None
        self.index_1M = torch.arange(capacity, device=device)[None]
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> "CachedDecoder":
        assert self.model.output is not None, "a stage of a pipeline returns no logits"
        blocks = list(self.model.layers.values())[: self.model.config.n_layers]  # no further predictions
        sides = [part for block in blocks for part in block.modules() if isinstance(part, KeyValues)]
        for i, module in enumerate(sides):
            memory = Memory(self.capacity, n_alike=0 if i else len(sides))
            self.hooks.append(module.register_forward_hook(memory))
        self.hooks.append(self.model.output.register_forward_pre_hook(_last_token))
        return self

    def __exit__(self, *raised: object) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    @torch.inference_mode()
    def __call__(self, tokens_BL: Tensor, **inputs: Tensor) -> Tensor:
        """`inputs` are what the model reads beside tokens, by name, of any shape."""
        assert self.hooks, "the cache lives inside `with`"
        positions = self.positions(tokens_BL.shape[1])
        logits_B1V = self.model(tokens_BL, positions, **inputs)
        self.length += tokens_BL.shape[1]
        return logits_B1V[:, 0]

    def positions(self, n: int) -> Positions:
        """Where the next `n` tokens of each row stand, and all keys up to them."""
        assert self.length + n <= self.capacity, f"{self.length + n} tokens, there is room for {self.capacity}"
        index_1M = self.index_1M[:, : self.length + n]
        position_BM, document_BM = index_1M, None
        if self.n_pads_B1 is not None:
            position_BM = index_1M - self.n_pads_B1
            document_BM = (index_1M < self.n_pads_B1).long()
        if self.length == 0:
            return Positions(position_BM, document_BM)
        new = slice(self.length, None)
        document_BL = None if document_BM is None else document_BM[:, new]
        return Positions(position_BM[:, new], document_BL, index_1M[:, new], index_1M, document_BM, at_end=True)


def _last_token(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
    """In front of the head: the logits of no other token are wanted."""
    return (inputs[0][:, -1:],)
