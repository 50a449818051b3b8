"""Expert parallelism over `hybridep::dispatch` and `hybridep::combine`.

Letters: T tokens, K choices of a token, R rows for experts that live here with their pads, D width, E experts, G of
which live here.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.comm.ops import HYBRIDEP_COMBINE, HYBRIDEP_DISPATCH
from core.nn.dispatch import Rows

OVERFLOW = (
    "HybridEP: more rows arrived than there is room for. Raise "
    "parallelism.hybridep_non_blocking_expert_capacity_factor (1 always suffices), or leave it out"
)


class HybridEP:
    """Rows arrive sorted by expert; each expert's are filled up with zeros to a multiple of `pad_multiple`.

    Without `capacity_factor` the host waits until it knows how many rows arrive. With it there is room for that share,
    in (0, 1], of the most that could; nobody waits, and a run in which more arrive ends with an error. Room that is
    left free is computed as rows of zeros by the last expert.
    """

    def __init__(self, group: ProcessGroup, *, capacity_factor: float | None = None, pad_multiple: int = 1) -> None:
        self.group, self.size = group.group_name, group.size()
        self.capacity_factor, self.pad_multiple = capacity_factor, pad_multiple

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Rows:
        capacity = self._capacity(ids_TK, n_experts // self.size)
        x_RD, weight_R, counts_G, overflow, handle = HYBRIDEP_DISPATCH(
            x_TD, ids_TK, weight_TK, n_experts, capacity, self.pad_multiple, self.group
        )
        if capacity is not None:
            torch._assert_async(overflow == 0, OVERFLOW)
            *others, last = counts_G.split(1)
            counts_G = torch.cat((*others, last + capacity - counts_G.sum()))
        return Rows(x_RD, weight_R, counts_G, (x_TD.shape[0], x_TD.dtype, handle))

    def combine(self, y_RD: Tensor, back: Any) -> Tensor:
        n_tokens, dtype, handle = back
        return HYBRIDEP_COMBINE(y_RD.to(dtype), handle, n_tokens, self.group)

    def _capacity(self, ids_TK: Tensor, n_here: int) -> int | None:
        """Rows that there is room for; the most that could arrive are all choices of all ranks that fit here."""
        if self.capacity_factor is None:
            return None
        n_tokens, top_k = ids_TK.shape
        most, pads = n_tokens * self.size * min(n_here, top_k), n_here * (self.pad_multiple - 1)
        return math.ceil((most * self.capacity_factor + pads) / self.pad_multiple) * self.pad_multiple
