"""Which keys a query may see, and what an attention kernel must do: its contract, for ours and those of others.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width, V width
of a value, D width of the residual stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from core.nn.module import Module
from core.nn.rope import Rotation

MaskMod = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
Mask = Any
"""What a kernel made of `Positions` for itself: None, a tensor, flex's BlockMask, ..."""


class Positions(NamedTuple):
    """Where the tokens of a batch stand. A tensor whose first axis is 1 says that all rows are alike.

    `position_BL` is the place in the document, `document_BL` the document of each token, whose tokens follow each other
    in the row (None: a row is one document), `index_BL` the place in the row where that is not 0, 1, 2, ... The next
    two say the same of the keys where these are not the tokens themselves, because some were computed earlier or
    elsewhere; `padding_BL` which tokens count nowhere. `spans` is what the host knows of `document_BL` and a device
    would have to be asked for: where documents start in the rows laid end to end, (S,) int32, the longest's length, and
    how many rows they are. `at_end` says that keys stand in their order and the tokens are the last of them.
    """

    position_BL: Tensor
    document_BL: Tensor | None = None
    index_BL: Tensor | None = None
    key_index_BM: Tensor | None = None
    key_document_BM: Tensor | None = None
    padding_BL: Tensor | None = None
    spans: tuple[Tensor, int, int] | None = None
    at_end: bool = False

    @classmethod
    def rows(cls, tokens_BL: Tensor) -> "Positions":
        """Every row is one document that starts at position 0."""
        return cls(torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but `spans` and `at_end`, which the host knows, in the order of the fields."""
        return self[:6]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows that differ, queries, keys."""
        keys = self.position_BL if self.key_index_BM is None else self.key_index_BM
        n_rows = 1 if self.is_plain else max(len(tensor) for tensor in self[1:5] if tensor is not None)
        return n_rows, self.position_BL.shape[1], keys.shape[1]

    @property
    def is_plain(self) -> bool:
        """Whether rows are single documents and the keys are the tokens, in their order."""
        return all(tensor is None for tensor in self[1:5])


def visible(positions: Positions, window: int | None = None) -> MaskMod:
    """The rule (row, head, query, key) -> may look.

    Causal; within the document if there are several; and not further back than `window` tokens, itself included.
    """
    keys_have_documents = positions.key_index_BM is not None and positions.document_BL is not None
    assert keys_have_documents == (positions.key_document_BM is not None), (
        "key_document goes with key_index and document"
    )
    n_rows, _, _ = positions.grid
    index, key_index, document, key_document = (
        None if tensor is None else tensor.expand(n_rows, -1)
        for tensor in (
            positions.index_BL,
            positions.index_BL if positions.key_index_BM is None else positions.key_index_BM,
            positions.document_BL,
            positions.document_BL if positions.key_document_BM is None else positions.key_document_BM,
        )
    )

    def rule(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        row = row if n_rows > 1 else torch.zeros_like(row)  # flex counts the rows of the queries, however alike
        at = query if index is None else index[row, query]
        key_at = key if key_index is None else key_index[row, key]
        seen = key_at <= at
        if window is not None:
            seen = seen & (at - key_at < window)
        if document is not None and key_document is not None:
            seen = seen & (document[row, query] == key_document[row, key])
        return seen

    return rule


class KernelUse(NamedTuple):
    """What a run asks of the kernel of one attention, as one rank calls it. The attention states the first part."""

    n_heads: int
    n_kv_heads: int
    qk_dim: int
    v_dim: int
    sinks: bool = False
    """One learned logit per head joins the softmax's denominator."""
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    """Of queries, keys and values."""
    trains: bool = False
    """Whether backward is asked for."""
    documents: bool = False
    """Whether a row holds several documents, which do not see each other."""
    cached: bool = False
    """Whether keys of earlier calls stand in front of the new ones, so that L is less than M."""
    reordered: bool = False
    """Whether the tokens of a row stand in another order than 0, 1, 2, ...: those of context parallelism do."""


class Kernel(Protocol):
    """What computes attention: softmax(scale q k^T, over the keys that a query sees) v.

    A kernel is a class in one file, anywhere: `core.nn.backends.register_kernel` names it, the setting
    `attention.backend` takes the name, and `window` is all that it is built from. Kernels that are equal share a mask,
    so equality and hash compare what a mask depends on; a frozen dataclass has both.

    * Who sees whom is one rule, `visible(positions, window)`: causal, within the document, at most `window` tokens
      back. A kernel may read it, or `positions` itself; `mask` is called once per forward and not in backward.
    * N is a multiple of K: query head n reads key/value head n // (N / K). Tensor parallelism, and context parallelism
      by `alltoall`, call with some of the heads; the N sinks are those of the heads.
    * Generating, and context parallelism by `allgather`, call with more keys than tokens, M > L: `positions` says where
      in the row the tokens (`index_BL`) and the keys (`key_index_BM`) stand. Under context parallelism neither is
      sorted.
    * Autograd finds the backward; checkpointing may call forward twice, which must compute the same. A kernel that is
      one operation of its own is saved by selective checkpointing if `core.activation_checkpoint.save_output` or
      the setting `save_ops` names it.
    * What it cannot do of all this, `problem` says in words, and no run that asks for it starts. The plan of a run
      computes with `sdpa` in place of a kernel that does not train on a CPU.
    """

    @property
    def window(self) -> int | None: ...

    def __init__(self, window: int | None = None) -> None: ...

    def problem(self, use: KernelUse) -> str | None:
        """Why it cannot do what is asked, such as "it has no backward on a cpu"; None if it can."""
        ...

    def mask(self, positions: Positions) -> Mask:
        """What calls with tokens and keys at `positions` need to know of who sees whom."""
        ...

    def __call__(
        self,
        q_BNLH: Tensor,
        k_BKMH: Tensor,
        v_BKMV: Tensor,
        mask: Mask,
        *,
        scale: float,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """The result (B, N, L, V), in the type of the queries (B, N, L, H); keys are (B, K, M, H), values (B, K, M, V).

        The three are views with any strides. A sink of head n adds exp(sinks_N[n]) to the denominator.
        """
        ...


class SelfAttention(Module, ABC):
    """What a block needs of its attention."""

    kernel: Kernel
    asks: KernelUse
    """What it asks of its kernel, whatever the run."""

    @abstractmethod
    def forward(self, x_BLD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        """What it adds to the residual stream (B, L, D); `mask` is the kernel's."""


class KeyValues(torch.nn.Module):
    """The key side of attention: what is given. Who holds more keys than these, from earlier or from elsewhere, hooks
    this module; so an attention calls it where its key side is smallest.
    """

    def forward(self, *sides: Tensor) -> tuple[Tensor, ...]:
        return sides
