"""How core reads a model of transformers at its head, so that the logits of a batch never exist whole.

Letters: B rows, L length, D width of the residual stream, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.nn.decoder import HeadReader, logits
from core.nn.layers import Head


class HeadDoor(nn.Module):
    """Stands in the place of the head in a model of transformers: returns what a reader makes of x (B, L, D) and the
    head, which the model hands on as its logits."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        vars(self).update(head=head, read=logits)  # the head is registered elsewhere

    @contextmanager
    def read_by(self, read: HeadReader) -> Iterator[None]:
        """While this runs, the head is read by `read`."""
        vars(self).update(read=read)
        try:
            yield
        finally:
            vars(self).update(read=logits)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.read(x_BLD, self.head, 0)  # pyrefly: ignore[not-callable]


class WholeLogits(Head):
    """The head of a model whose logits are there already: hands them on."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor, read: Any = None) -> Tensor:
        """The logits (..., V) themselves."""
        return x


class Stream:
    """What blocks return, as a model looks at it: the residual stream (B, L, D), and nothing else."""

    def __init__(self, x_BLD: Tensor) -> None:
        self.last_hidden_state = x_BLD

    def __getitem__(self, place: object) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class Marked(nn.Module):
    """Returns the same thing for whatever it is called with."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.made


def plain_head(theirs: Any, dim: int) -> str:
    """The name that the head has in a model which hands on as logits what its head makes of the residual stream by a
    plain product; "" for any other, as one that scales or caps its logits.

    Found by asking the model itself, with marks in the places of its blocks and of its head.
    """
    head = theirs.get_output_embeddings()
    name = next((name for name, part in theirs.named_children() if part is head), "")
    if not name or type(head) is not nn.Linear or head.bias is not None:
        return ""
    mark, parts = torch.zeros(1, 1, 1, device="cpu"), dict(theirs._modules)
    stream = Stream(torch.zeros(1, 1, dim, device="cpu"))
    theirs._modules |= {theirs.base_model_prefix: Marked(stream), name: Marked(mark)}
    try:
        found = theirs(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu"), use_cache=False).logits
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return ""  # a model that is made otherwise: its whole logits are as right
    finally:
        theirs._modules.update(parts)
    return name if found is mark else ""
