"""The attention kernel `sdpa`: PyTorch's, on every device.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width, V width
of a value.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.nn.backends import kernel_class
from core.nn.kernel import KernelUse, Mask, Positions, visible
from core.nn.module import inference_forms

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class SDPA:
    """PyTorch's scaled_dot_product_attention, on every device; on a CPU its kernel, tile by tile where that is less
    work."""

    window: int | None = None
    tiled: bool = True
    """Whether a CPU may: what is planned there for a GPU has masks and no tiles."""

    def problem(self, use: KernelUse) -> str | None:
        """It can do everything."""
        return None

    def mask(self, positions: Positions) -> Mask:
        """None where the causal flag of the kernel says it all; that of `tiles`, where these take the tokens; else the
        rule on the grid of rows, queries and keys. On a CPU the last token of a row has one of the keys that a window
        leaves it, or None for all of those."""
        tiles: Any = kernel_class("tiles")(self.window)
        if positions.is_plain and (self.window is None or self.window >= positions.position_BL.shape[1]):
            return None
        if self.tiled and tiles.takes(positions):
            return tiles.mask(positions)
        if positions.at_end and positions.position_BL.shape[1] == 1 and positions.position_BL.is_cpu:
            return _of_last_token(positions, self.window)
        row, query, key = (torch.arange(n, device=positions.position_BL.device) for n in positions.grid)
        return visible(positions, self.window)(row[:, None, None], None, query[None, :, None], key[None, None])[:, None]

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
        one = q_BNLH.shape[2] == 1 and (mask is None or mask.dtype == torch.bool)
        if one:
            n_keys = self.window if mask is None else mask.shape[-1]
            k_BKMH, v_BKMV = (side if n_keys is None else side[:, :, -n_keys:] for side in (k_BKMH, v_BKMV))
            if inference_forms(q_BNLH):
                return one_query(q_BNLH, k_BKMH, v_BKMV, mask, scale, sinks_N)
        assert one or mask is not None or q_BNLH.shape[2] == k_BKMH.shape[2], "no mask, and the keys are not the tokens"
        tiles: Any = kernel_class("tiles")(self.window)
        if self.tiled and not one and tiles.pays(q_BNLH, mask, sinks_N):
            return tiles(q_BNLH, k_BKMH, v_BKMV, mask, scale=scale, sinks_N=sinks_N)
        v_dim = v_BKMV.shape[-1]
        if sinks_N is not None:
            q_BNLH, k_BKMH, v_BKMV, mask = with_sinks(q_BNLH, k_BKMH, v_BKMV, mask, sinks_N / scale)
        if q_BNLH.is_cpu and v_BKMV.shape[-1] < q_BNLH.shape[-1]:  # the fused kernel of a CPU wants one width
            v_BKMV = F.pad(v_BKMV, (0, q_BNLH.shape[-1] - v_BKMV.shape[-1]))
        grouped = q_BNLH.shape[1] != k_BKMH.shape[1]
        return F.scaled_dot_product_attention(
            q_BNLH, k_BKMH, v_BKMV, attn_mask=mask, is_causal=mask is None and not one, enable_gqa=grouped, scale=scale
        )[..., :v_dim]


def with_sinks(
    q_BNLH: Tensor, k_BKMH: Tensor, v_BKMV: Tensor, mask: Mask, logit_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """Queries, keys, values and mask with one key more, whose product with a query of head n is `logit_N[n]`.

    Every query sees it and takes nothing from it, so that the softmax's denominator has one learned term more, and
    fused kernels compute it:

        q' = [q, logit, 0...]    k' = [k, 0, 0...], and last [0, 1, 0...]    v' = [v, 0...], and last 0

    The width grows by eight because kernels want rows of whole 16 bytes.
    """
    n_queries, n_keys = q_BNLH.shape[2], k_BKMH.shape[2]
    extra_BNL8 = F.pad(logit_N.to(q_BNLH.dtype).view(1, -1, 1, 1), (0, 7)).expand(*q_BNLH.shape[:3], 8)
    k_BKMH, v_BKMV = F.pad(k_BKMH, (0, 8, 0, 1)), F.pad(v_BKMV, (0, 8, 0, 1))
    k_BKMH = k_BKMH + F.pad(k_BKMH.new_ones(1, 1), (k_BKMH.shape[-1] - 8, 7, n_keys, 0))
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q_BNLH.device)
        mask = mask.tril(n_keys - n_queries)[None, None]
    return torch.cat((q_BNLH, extra_BNL8), -1), k_BKMH, v_BKMV, F.pad(mask, (0, 1), value=True)


def _of_last_token(positions: Positions, window: int | None) -> Mask:
    """Which of the keys that a window leaves the last token of each row sees, (B or 1, 1, 1, M); None: all."""
    document_BM = positions.key_document_BM
    if document_BM is None or positions.document_BL is None:
        return None
    seen_BM = document_BM == positions.document_BL
    return (seen_BM if window is None else seen_BM[:, -window:])[:, None, None]


def one_query(
    q_BN1H: Tensor,
    k_BKMH: Tensor,
    v_BKMV: Tensor,
    mask: Mask,
    scale: float,
    sinks_N: Tensor | None,
) -> Tensor:
    """Attention of the last token of each row, (B, N, 1, V), on a CPU: heads of a group are queries of one key head,
    which is read once for all of them."""
    q_BKGH = q_BN1H.reshape(len(q_BN1H), k_BKMH.shape[1], -1, q_BN1H.shape[-1])
    v_dim = v_BKMV.shape[-1]
    if v_dim != q_BN1H.shape[-1]:  # the fused kernel wants one width
        widest = max(v_dim, q_BN1H.shape[-1])
        q_BKGH, k_BKMH, v_BKMV = (F.pad(side, (0, widest - side.shape[-1])) for side in (q_BKGH, k_BKMH, v_BKMV))
    hidden = None if mask is None else torch.zeros_like(mask, dtype=q_BN1H.dtype).masked_fill_(~mask, -torch.inf)
    o_BKGV, lse_BKG = FUSED(q_BKGH, k_BKMH, v_BKMV, attn_mask=hidden, scale=scale)
    if sinks_N is not None:
        o_BKGV = o_BKGV * (lse_BKG - sinks_N.view(lse_BKG.shape[1:])).sigmoid().unsqueeze(-1).to(o_BKGV.dtype)
    return o_BKGV.reshape(*q_BN1H.shape[:3], -1)[..., :v_dim]
