"""The largest logits of attention, which no kernel tells: computed beside it from the queries and keys of a step.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width, V width
of a value.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.activation_checkpoint.region import is_recomputing, off_the_record
from core.nn.decoder import Block, Decoder
from core.nn.kernel import Kernel, KernelUse, Mask, MaskMod, Positions, visible

MOST_PAIRS = 2**22
"""So many are computed at a time: 16 MiB in float32."""


class WatchedMask(NamedTuple):
    """The mask of a kernel, and the rule that it was made of."""

    own: Mask
    sees: MaskMod


@dataclass(eq=False)
class WatchedKernel:
    """Computes as `kernel` does, and keeps the largest logit of each call: one more product of queries and keys."""

    kernel: Kernel
    found: list[Tensor] = field(default_factory=list)

    @property
    def window(self) -> int | None:
        return self.kernel.window

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WatchedKernel) and self.kernel == other.kernel

    def __hash__(self) -> int:
        return hash(self.kernel)

    def problem(self, use: KernelUse) -> str | None:
        return self.kernel.problem(use)

    def mask(self, positions: Positions) -> WatchedMask:
        return WatchedMask(self.kernel.mask(positions), visible(positions, self.window))

    def __call__(
        self, q_BNLH: Tensor, k_BKMH: Tensor, v_BKMV: Tensor, mask: WatchedMask, *, scale: float, **rest: Any
    ) -> Tensor:
        with off_the_record(), torch.no_grad():
            if not is_recomputing():
                self.found.append(largest_logit(q_BNLH, k_BKMH, mask.sees, scale=scale))
        return self.kernel(q_BNLH, k_BKMH, v_BKMV, mask.own, scale=scale, **rest)


def largest_logit(q_BNLH: Tensor, k_BKMH: Tensor, sees: MaskMod, *, scale: float) -> Tensor:
    """The largest logit of queries (B, N, L, H) with the keys (B, K, M, H) that they see, a scalar; no more than
    `MOST_PAIRS` are there at once, or those of one query."""
    (n_rows, n_heads, length, _), (n_kv_heads, n_keys) = q_BNLH.shape, k_BKMH.shape[1:3]
    n = max(1, MOST_PAIRS // (n_heads * n_keys))
    key_M = torch.arange(n_keys, device=q_BNLH.device)
    largest = q_BNLH.new_full((), -torch.inf)
    for row in range(n_rows):
        q_KGLH, k_K1MH = q_BNLH[row].unflatten(0, (n_kv_heads, -1)), k_BKMH[row].unsqueeze(1)
        for query_L in torch.arange(length, device=q_BNLH.device).split(n):
            logits_KGLM = q_KGLH[:, :, query_L] @ k_K1MH.mT
            seen_LM = sees(query_L.new_tensor(row), None, query_L[:, None], key_M[None])
            largest = torch.maximum(largest, logits_KGLM.masked_fill_(~seen_LM, -torch.inf).amax())
    return largest.float() * scale


@contextmanager
def watched_logits(models: Sequence[Decoder]) -> Iterator[dict[str, list[Tensor]]]:
    """The largest logit of each call of an attention, a scalar, by its layer (layers.3), while the block runs."""
    found: dict[str, list[Tensor]] = {}
    holders: list[tuple[Any, Kernel]] = []
    for model in models:
        for number, block in model.layers.items():
            if not isinstance(block, Block):  # another program's, whose attention is not known
                continue
            holder: Any = block.attention
            while hasattr(holder.kernel, "kernel"):  # one that calls another with other tokens or heads
                holder = holder.kernel
            holders.append((holder, holder.kernel))
            holder.kernel = watched = WatchedKernel(holder.kernel)
            found[f"layers.{number}"] = watched.found
    try:
        yield found
    finally:
        for holder, kernel in holders:
            holder.kernel = kernel
