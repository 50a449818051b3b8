"""Attention on a CPU, tile by tile: a tile is some queries of a row and the keys that they may see.

PyTorch's fused kernel for CPUs computes what a mask hides, and what lies ahead up to the next 512 keys (torch 2.11 to
2.15). Here it is called with fewer keys: of the document, inside the window, not ahead. The arithmetic is its own.

Letters: B rows, L length, N query heads, K key/value heads, H width of queries, keys and values alike, T queries of a
tile, S keys of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from core.activation_checkpoint.save_output import save_output
from core.nn.grouped import LIBRARY
from core.nn.kernel import KernelUse, Mask, Positions
from core.nn.tiling import WORTH_CUTTING, Tile, rows_of, starts

LIBRARY.define(
    "tiled_attention(Tensor q, Tensor k, Tensor v, Tensor? start, int? window, Tensor? sinks, float scale) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "tiled_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? start, "
    "int? window, Tensor? sinks, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)
TILED_ATTENTION = save_output(torch.ops.armature.tiled_attention.default)
TILED_ATTENTION_BACKWARD = torch.ops.armature.tiled_attention_backward.default
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Tiles:
    """Attention of whole rows on a CPU, computed in fp32 at least; what `sdpa` is there, where that is less work."""

    window: int | None = None

    def problem(self, use: KernelUse) -> str | None:
        if use.device.type != "cpu":
            return f"it runs on a cpu, not on {use.device.type}"
        return "it wants whole rows in their order" if use.cached or use.reordered else None

    def mask(self, positions: Positions) -> Mask:
        """Where the document of each token starts in its row, (B or 1, L; int64)."""
        return starts(positions)

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
        """As `Kernel` says; no mask is that of rows which are single documents."""
        width, v_width = q_BNLH.shape[-1], v_BKMV.shape[-1]
        if v_width < width:
            v_BKMV = F.pad(v_BKMV, (0, width - v_width))
        elif v_width > width:
            q_BNLH, k_BKMH = (F.pad(side, (0, v_width - width)) for side in (q_BNLH, k_BKMH))
        o_BNLH, _ = TILED_ATTENTION(q_BNLH, k_BKMH, v_BKMV, mask, self.window, sinks_N, scale)
        return o_BNLH[..., :v_width]

    @staticmethod
    def takes(positions: Positions) -> bool:
        """Whether tokens are on a CPU, are the keys, and stand in their order."""
        return positions.position_BL.is_cpu and positions.index_BL is None and positions.key_index_BM is None

    @staticmethod
    def pays(q_BNLH: Tensor, mask: Mask, sinks_N: Tensor | None) -> bool:
        """Whether `mask` is one of tiles; without any, whether tiles are less work than one call with the causal flag:
        PyTorch's kernel has no sinks and is slow in 16 bits."""
        if mask is not None:
            return mask.dtype == torch.int64
        short = q_BNLH.dtype.itemsize < 4
        fits = WORTH_CUTTING.start <= q_BNLH.shape[2] < WORTH_CUTTING.stop  # dynamo has no `in` for varying lengths
        return q_BNLH.is_cpu and (sinks_N is not None or short or fits)


def like(x_BNLH: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor (B, N, L, H) whose heads of one token lie next to each other, as the projections want them."""
    n_rows, n_heads, length, width = x_BNLH.shape
    return x_BNLH.new_empty(n_rows, length, n_heads, width, dtype=dtype).transpose(1, 2)


def with_whole_heads(x_BNLH: Tensor) -> Tensor:
    """The tensor, copied where the numbers of a head do not lie next to each other: the kernel wants them so."""
    return x_BNLH if x_BNLH.stride(-1) == 1 else x_BNLH.contiguous()


def sides_of(rows: slice, tile: Tile) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the queries of a tile stand in a tensor (B, N, L, ...), and its keys."""
    heads = slice(None)
    return (rows, heads, slice(tile.start, tile.end)), (rows, heads, slice(tile.first, tile.end))


def settings_of(tile: Tile, dtype: torch.dtype, scale: float) -> dict[str, Any]:
    """What PyTorch's kernel is told of a tile beside its tensors."""
    mask = tile.hidden_TS
    return {
        "dropout_p": 0.0,
        "is_causal": mask is None,
        "attn_mask": None if mask is None else mask.to(dtype),
        "scale": scale,
    }


@torch.library.impl(LIBRARY, "tiled_attention", "CPU")
def _attend(
    q_BNLH: Tensor,
    k_BKLH: Tensor,
    v_BKLH: Tensor,
    start_BL: Tensor | None,
    window: int | None,
    sinks_N: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q_BNLH.dtype, torch.float32)
    q, k, v = (with_whole_heads(side.to(dtype)) for side in (q_BNLH, k_BKLH, v_BKLH))
    o_BNLH, lse_BNL = like(q_BNLH, q_BNLH.dtype), q.new_empty(q.shape[:3])
    for rows, tile in rows_of(start_BL, len(q), q.shape[2], window):
        of_q, of_k = sides_of(rows, tile)
        o_BNLH[of_q], lse_BNL[of_q] = FUSED(q[of_q], k[of_k], v[of_k], **settings_of(tile, dtype, scale))
    if sinks_N is not None:
        whole_BNL = torch.logaddexp(lse_BNL, sinks_N.to(dtype)[:, None])
        o_BNLH *= (lse_BNL - whole_BNL).exp_().unsqueeze(-1)
        lse_BNL = whole_BNL
    return o_BNLH, lse_BNL


@torch.library.impl(LIBRARY, "tiled_attention_backward", "CPU")
def _attend_backward(
    grad_BNLH: Tensor,
    q_BNLH: Tensor,
    k_BKLH: Tensor,
    v_BKLH: Tensor,
    o_BNLH: Tensor,
    lse_BNL: Tensor,
    start_BL: Tensor | None,
    window: int | None,
    sinks_N: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks, (0,) without any; each tile's are those of its keys' share."""
    grad, q, k, v, o = (
        with_whole_heads(side.to(lse_BNL.dtype)) for side in (grad_BNLH, q_BNLH, k_BKLH, v_BKLH, o_BNLH)
    )
    for_q, for_k, for_v = like(q, q_BNLH.dtype), torch.zeros_like(k), torch.zeros_like(v)
    for rows, tile in rows_of(start_BL, len(q), q.shape[2], window):
        of_q, of_k = sides_of(rows, tile)
        sides = grad[of_q], q[of_q], k[of_k], v[of_k], o[of_q], lse_BNL[of_q]
        for_q[of_q], for_keys, for_values = FUSED_BACKWARD(*sides, **settings_of(tile, q.dtype, scale))
        for_k[of_k] += for_keys
        for_v[of_k] += for_values
    for_sinks = q.new_empty(0)
    if sinks_N is not None:
        share_BNL = (sinks_N.to(q.dtype)[:, None] - lse_BNL).exp_()
        for_sinks = -(share_BNL * (grad * o).sum(-1)).sum((0, 2)).to(sinks_N.dtype)
    return for_q, for_k.to(k_BKLH.dtype), for_v.to(v_BKLH.dtype), for_sinks


@torch.library.register_fake(TILED_ATTENTION, lib=LIBRARY)
def _fake(q_BNLH: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q_BNLH.dtype, torch.float32)
    return like(q_BNLH, q_BNLH.dtype), q_BNLH.new_empty(q_BNLH.shape[:3], dtype=dtype)


@torch.library.register_fake(TILED_ATTENTION_BACKWARD, lib=LIBRARY)
def _fake_backward(
    grad_BNLH: Tensor, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks_N = rest[4]
    for_sinks = q_BNLH.new_empty(0, dtype=rest[1].dtype) if sinks_N is None else torch.empty_like(sinks_N)
    return like(q_BNLH, q_BNLH.dtype), torch.empty_like(k_BKLH), torch.empty_like(v_BKLH), for_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, ctx.window, sinks, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, start, sinks)


def _backward(ctx: Any, grad_BNLH: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, start, sinks = ctx.saved_tensors
    for_q, for_k, for_v, for_sinks = TILED_ATTENTION_BACKWARD(
        grad_BNLH, q, k, v, o, lse, start, ctx.window, sinks, ctx.scale
    )
    return for_q, for_k, for_v, None, None, None if sinks is None else for_sinks, None


torch.library.register_autograd(TILED_ATTENTION, _backward, setup_context=_keep, lib=LIBRARY)


@register_flop_formula([torch.ops.armature.tiled_attention])
def _flops(q: tuple[int, ...], *rest: Any, **settings: Any) -> int:
    """As PyTorch's kernels are counted: each query with every key, hidden or not; two products."""
    n_rows, n_heads, length, width = q
    return 2 * 2 * n_rows * n_heads * length * length * width


@register_flop_formula([torch.ops.armature.tiled_attention_backward])
def _flops_backward(grad: tuple[int, ...], *rest: Any, **settings: Any) -> int:
    """The scores again, and two products for each of the forward's."""
    n_rows, n_heads, length, width = grad
    return 2 * 5 * n_rows * n_heads * length * length * width
