"""PyTorch's flex_attention as an attention kernel.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width, V width
of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from core.nn.kernel import KernelUse, Mask, Positions, visible


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
        from torch.nn.attention.flex_attention import create_block_mask

        n_rows, n_queries, n_keys = positions.grid
        rows = None if n_rows == 1 else n_rows
        rule = visible(positions, self.window)
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
        attend = flex_attention if plain else _compiled(flex_attention)
        grouped = q_BNLH.shape[1] != k_BKMH.shape[1]
        if sinks_N is None:
            return attend(q_BNLH, k_BKMH, v_BKMV, block_mask=mask, enable_gqa=grouped, scale=scale)
        o_BNLH, aux = attend(
            q_BNLH, k_BKMH, v_BKMV, block_mask=mask, enable_gqa=grouped, scale=scale, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        # One term e^sink more in the denominator: o e^lse / (e^lse + e^sink).
        return o_BNLH * torch.sigmoid(aux.lse - sinks_N[:, None]).unsqueeze(-1).to(o_BNLH.dtype)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)
