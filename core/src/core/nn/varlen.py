"""PyTorch's varlen_attn as an attention kernel: documents end to end, each compared with itself alone.

Letters: B rows, L length, T = B L tokens of all rows, S documents of all rows, N query heads, K key/value heads, H head
width, V width of a value.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from core.nn.kernel import KernelUse, Mask, Positions
from core.nn.tiling import spans

WIDEST_HEAD = 256
TAKES_FEW_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether query heads may share keys; torch 2.11 wants these repeated."""
LENGTH_STEP = 128
"""The longest document is told in so many tokens, so that few lengths are compiled."""


@dataclass(frozen=True)
class Varlen:
    """PyTorch's varlen_attn: work in proportion to the documents, on a GPU, in bfloat16. Selective checkpointing saves
    its output."""

    window: int | None = None

    def problem(self, use: KernelUse) -> str | None:
        """It is FlashAttention without sinks, on whole rows."""
        width = max(use.qk_dim, use.v_dim)
        if use.device.type != "cuda":
            return f"it runs on a gpu, not on a {use.device.type}"
        if use.sinks:
            return "it has no sinks"
        if use.cached or use.reordered:
            return "it wants whole rows in their order"
        if use.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16, not in {str(use.dtype).removeprefix('torch.')}"
        if width > WIDEST_HEAD or width % 8:
            return f"a head must have a multiple of 8 numbers, {WIDEST_HEAD} at most, and has {width}"
        return None

    def mask(self, positions: Positions) -> Mask:
        """Where documents start in the given rows (S,), and how long the longest is; None where rows are documents.

        The host knows both of the rows that it reads; otherwise `document_BL` is asked, and its device waited for.
        """
        if positions.document_BL is None:
            return None
        return spans(positions.document_BL) if positions.spans is None else positions.spans

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
        assert sinks_N is None, "varlen_attn has no sinks"
        n_rows, n_heads, length, width = q_BNLH.shape
        v_width = v_BKMV.shape[-1]
        q_BNLH, k_BKMH = (F.pad(side, (0, max(v_width - width, 0))) for side in (q_BNLH, k_BKMH))
        v_BKMV = F.pad(v_BKMV, (0, max(width - v_width, 0)))
        settings: dict[str, Any] = {"enable_gqa": True} if TAKES_FEW_KEYS else {}
        if not TAKES_FEW_KEYS:
            k_BKMH, v_BKMV = (side.repeat_interleave(n_heads // side.shape[1], 1) for side in (k_BKMH, v_BKMV))
        ends_S, longest = ends(mask, n_rows, length, q_BNLH.device)
        window = -1 if self.window is None else self.window - 1
        q, k, v = (side.transpose(1, 2).flatten(0, 1) for side in (q_BNLH, k_BKMH, v_BKMV))
        settings |= {"scale": scale, "window_size": (window, 0)}
        o_TNV = varlen_attn(q, k, v, ends_S, ends_S, longest, longest, **settings)
        assert isinstance(o_TNV, Tensor)
        return o_TNV.unflatten(0, (n_rows, length)).transpose(1, 2)[..., :v_width]


def ends(mask: Mask, n_rows: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """0 and where each document of `n_rows` rows of `length` ends, laid end to end (S + 1,), and how long one may be.

    Documents of one row alone are those of all.
    """
    total = n_rows * length
    if mask is None:
        return torch.arange(0, total + 1, length, dtype=torch.int32, device=device), length
    starts_S, longest, n_given = mask
    if n_given < n_rows:
        first_B1 = torch.arange(0, total, length, dtype=torch.int32, device=device).unsqueeze(1)
        starts_S = (first_B1 + starts_S).flatten()
    return F.pad(starts_S, (0, 1), value=total), min(-(-longest // LENGTH_STEP) * LENGTH_STEP, length)


def _flops(q: tuple[int, int, int], k: tuple[int, ...], v: tuple[int, int, int], *rest: Any, **settings: Any) -> int:
    """Each query of (T, N, H) with as many keys as the longest document may have; two products."""
    return 2 * q[0] * rest[2] * q[1] * (q[2] + v[2])


def _flops_backward(grad: tuple[int, int, int], q: tuple[int, int, int], *rest: Any, **settings: Any) -> int:
    """The scores again, and two products for each of the forward's."""
    return 2 * q[0] * rest[6] * q[1] * (3 * q[2] + 2 * grad[2])


if torch.ops.torch_attn._varlen_attn not in flop_registry:  # torch 2.11 counts nothing for it
    register_flop_formula([torch.ops.torch_attn._varlen_attn])(_flops)
    register_flop_formula([torch.ops.torch_attn._varlen_attn_backward])(_flops_backward)
