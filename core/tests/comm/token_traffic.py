"""Tokens on several ranks, what should arrive where by plain loops, and transports that watch or disturb the reference.

Letters: T tokens, K choices of a token, D width, G experts on a rank.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.multiprocessing.reductions import StorageWeakRef

from core.comm.reference import HybridReference, Reference

D, E = 128, 8


class Traffic(NamedTuple):
    """What a rank sends; the first number of a token is its name, 100 times the rank plus its place."""

    x_TD: Tensor
    ids_TK: Tensor
    weight_TK: Tensor


CASES = [
    "mixed",
    "masked",
    "nothing chosen",
    "a rank without tokens",
    "no tokens at all",
    "all to one rank",
    "one choice",
    "all experts",
]


def traffic(case: str, rank: int, n_tokens: int | None = None) -> Traffic:
    """What `rank` sends in a case: every rank can tell what all others send."""
    generator = torch.Generator().manual_seed(31 * CASES.index(case) + rank)
    n = 6 + rank if n_tokens is None else n_tokens
    if case == "no tokens at all" or (case == "a rank without tokens" and rank == 0):
        n = 0
    top_k = {"one choice": 1, "all experts": E}.get(case, 3)
    x_TD = torch.randn(n, D, generator=generator)
    x_TD[:, 0] = 100 * rank + torch.arange(n)
    ids_TK = torch.rand(n, E, generator=generator).argsort(1)[:, :top_k].contiguous()
    weight_TK = torch.rand(n, top_k, generator=generator)
    if case == "all to one rank":
        ids_TK = torch.arange(2).expand(n, 2).contiguous()
        weight_TK = weight_TK[:, :2].contiguous()
    if case in ("masked", "nothing chosen"):
        share = 0.4 if case == "masked" else 1.0
        ids_TK = ids_TK.masked_fill(torch.rand(n, top_k, generator=generator) < share, -1)
    return Traffic(x_TD, ids_TK, weight_TK)


Choice = tuple[int, int, int]
"""(source rank, token, number of the choice)."""


def arriving(sent: list[Traffic], rank: int) -> list[list[Choice]]:
    """The choices of each expert on `rank`, in the order of source ranks and tokens."""
    n_here = E // len(sent)
    experts: list[list[Choice]] = [[] for _ in range(n_here)]
    for source, (_, ids_TK, _) in enumerate(sent):
        for token, ids in enumerate(ids_TK.tolist()):
            for k, expert in enumerate(ids):
                if expert // n_here == rank:
                    experts[expert % n_here].append((source, token, k))
    return experts


def numbers_like(x: Tensor, seed: int) -> Tensor:
    """Drawn numbers of the shape and type of `x`."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


class Watched:
    """A transport that counts the calls of another, and remembers the memory that they gave out."""

    def __init__(self, transport: Any) -> None:
        self.transport, self.namespace = transport, transport.namespace
        self.calls: Counter[str] = Counter()
        self.given: list[StorageWeakRef] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.transport, name)
        return call if name in ("close", "fake_handle") else lambda *args: self.noted(name, call(*args))

    def noted(self, name: str, result: Any) -> Any:
        self.calls[name] += 1
        for part in result if isinstance(result, tuple) else (result,):
            for tensor in part if isinstance(part, list) else (part,):
                self.given.append(StorageWeakRef(tensor.untyped_storage()))
        return result

    def alive(self) -> int:
        """How many of the tensors given out still have memory."""
        return sum(not storage.expired() for storage in self.given)


class Shuffled:
    """DeepEP's operations by the reference, the rows of every dispatch in an order of its own."""

    namespace = "deepep"

    def __init__(self, group: ProcessGroup) -> None:
        self.reference = Reference(group)
        self.generator = torch.Generator().manual_seed(group.rank())

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Any:
        rows, local, weight, counts, handle = self.reference.dispatch(x_TD, ids_TK, weight_TK, n_experts)
        order = torch.randperm(len(rows), generator=self.generator)
        return rows[order], local[order], weight[order], counts, [*handle, order]

    def dispatch_cached(self, x_TD: Tensor, handle: list[Tensor], n_rows: int) -> Tensor:
        *sent, order = handle
        return self.reference.dispatch_cached(x_TD, sent, n_rows)[order]

    def combine(self, rows: Tensor, handle: list[Tensor], n_tokens: int) -> Tensor:
        *sent, order = handle
        return self.reference.combine(rows[order.argsort()], sent, n_tokens)

    def combine_weights(self, rows: Tensor, weight: Tensor, handle: list[Tensor], n_tokens: int) -> Any:
        return self.combine(rows, handle, n_tokens), self.combine(weight, handle, n_tokens)


def reference(namespace: str, group: ProcessGroup) -> Reference | HybridReference:
    return (Reference if namespace == "deepep" else HybridReference)(group)
