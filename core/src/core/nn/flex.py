"""PyTorch's flex_attention as an attention kernel.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width, V width
of a value, Q blocks of queries, S blocks of keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from core.nn.kernel import KernelUse, Mask, MaskMod, Positions, visible
from core.nn.tiling import starts

BLOCK_SIZE = 128
"""Queries, and keys, of a block that is computed or skipped; PyTorch's own default."""


@dataclass(frozen=True)
class Flex:
    """PyTorch's flex_attention: skips masked blocks; compiled on an accelerator, no backward on a CPU.

    Inside a compiled block the block's compiler sees the plain function.
    """

    window: int | None = None

    def problem(self, use: KernelUse) -> str | None:
        """It has no backward on a CPU in PyTorch 2.11 to 2.15."""
        return "it cannot train on a cpu" if use.trains and use.device.type == "cpu" else None

    def mask(self, positions: Positions) -> Mask:
        """A BlockMask: of whole rows in their order by arithmetic, of others from the table of queries by keys."""
        from torch.nn.attention.flex_attention import create_block_mask

        n_rows, n_queries, n_keys = positions.grid
        rows = None if n_rows == 1 else n_rows
        rule = visible(positions, self.window)
        if positions.index_BL is None and positions.key_index_BM is None:
            return block_mask(starts(positions), self.window, rule)
        return create_block_mask(rule, rows, None, n_queries, n_keys, device=positions.position_BL.device)

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
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        plain = q_BNLH.device.type == "cpu" or torch.compiler.is_compiling()
        attend = flex_attention if plain else compiled_kernel(flex_attention)
        grouped = q_BNLH.shape[1] != k_BKMH.shape[1]
        if sinks_N is None:
            return attend(q_BNLH, k_BKMH, v_BKMV, block_mask=mask, enable_gqa=grouped, scale=scale)
        o_BNLH, aux = attend(
            q_BNLH, k_BKMH, v_BKMV, block_mask=mask, enable_gqa=grouped, scale=scale, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        # One term e^sink more in the denominator: o e^lse / (e^lse + e^sink).
        return o_BNLH * torch.sigmoid(aux.lse - sinks_N[:, None]).unsqueeze(-1).to(o_BNLH.dtype)


def block_mask(start_BL: Tensor, window: int | None, rule: MaskMod) -> Mask:
    """The BlockMask of `rule` for rows whose tokens' documents start at `start_BL`, without a table of queries by keys.

    What the queries of a block see is one stretch of keys, which ends with the block: the first query sees furthest
    back. A block of keys before the last that even the last query sees whole is not masked at all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length, device = start_BL.shape[1], start_BL.device
    place_L = torch.arange(length, device=device)
    oldest_BL = start_BL if window is None else torch.maximum(start_BL, place_L - window + 1)
    block_S = torch.arange(-(-length // BLOCK_SIZE), device=device)
    first_Q, last_Q = block_S * BLOCK_SIZE, block_S * BLOCK_SIZE + BLOCK_SIZE - 1
    any_BQ = oldest_BL[:, first_Q] // BLOCK_SIZE
    all_BQ = (oldest_BL[:, last_Q.clamp(max=length - 1)] + BLOCK_SIZE - 1) // BLOCK_SIZE
    before_QS = block_S < block_S[:, None]
    whole_BQS = before_QS & (block_S >= all_BQ[..., None]) & (last_Q < length)[:, None]
    part_BQS = (before_QS | torch.eye(len(block_S), dtype=torch.bool, device=device)) & (block_S >= any_BQ[..., None])
    sides = (table.unsqueeze(1).int() for table in (part_BQS & ~whole_BQS, whole_BQS))
    counted = ((t.sum(-1, dtype=torch.int32), t.argsort(dim=-1, descending=True, stable=True).int()) for t in sides)
    (n_part, part), (n_whole, whole) = counted
    return BlockMask.from_kv_blocks(
        n_part, part, n_whole, whole, BLOCK_SIZE=BLOCK_SIZE, mask_mod=rule, seq_lengths=(length, length)
    )


@cache
def compiled_kernel(function: Callable) -> Callable:
    """The function compiled by itself, as one operation that checkpointing sees: unseen it would run again in backward,
    whatever is to be saved."""
    return torch.compile(function, options={"wrap_inductor_compiled_regions": True})
