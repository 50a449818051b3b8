"""Attention on a CPU, tile by tile: a tile is some queries of a row and the keys that they may see.

PyTorch's fused kernel for CPUs computes what a mask hides, and what lies ahead up to the next 512 keys (torch 2.11 to
2.15). Here it is called with fewer keys: of the document, inside the window, not ahead. The arithmetic is its own.

Letters: B rows, L length, N query heads, K key/value heads, G query heads of a key/value head, H width of queries, keys
and values alike, T queries of a tile, S keys of a tile.
"""

from collections.abc import Iterator
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
        return q_BNLH.is_cpu and (sinks_N is not None or short or q_BNLH.shape[2] in WORTH_CUTTING)


def like(x_BNLH: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor (B, N, L, H) whose heads of one token lie next to each other, as the projections want them."""
    n_rows, n_heads, length, width = x_BNLH.shape
    return x_BNLH.new_empty(n_rows, length, n_heads, width, dtype=dtype).transpose(1, 2)


def with_whole_heads(x_BNLH: Tensor) -> Tensor:
    """The tensor, copied where the numbers of a head do not lie next to each other: the kernel wants them so."""
    return x_BNLH if x_BNLH.stride(-1) == 1 else x_BNLH.contiguous()


class TileCall:
    """What the calls for one tile share: heads of a group are more queries where the tile has a mask of its own; where
    it has the causal flag, keys and values are repeated for them."""

    def __init__(self, rows: slice, tile: Tile, n_groups: int, dtype: torch.dtype) -> None:
        self.rows, self.tile, self.n_groups = rows, tile, n_groups
        mask = tile.hidden_TS
        self.settings: dict[str, Any] = {"dropout_p": 0.0, "is_causal": mask is None}
        if mask is not None:
            self.settings["attn_mask"] = mask.to(dtype).repeat(n_groups, 1)
        self.folds = mask is not None and n_groups > 1
        self.repeats = mask is None and n_groups > 1

    def queries(self, x_BNL: Tensor) -> Tensor:
        """The part of a tensor (B, N, L) or (B, N, L, H) that belongs to the queries, as the kernel takes it."""
        part = x_BNL[self.rows, :, self.tile.start : self.tile.end]
        return part.unflatten(1, (-1, self.n_groups)).flatten(2, 3) if self.folds else part

    def write(self, x_BNL: Tensor, result: Tensor) -> None:
        """Put the kernel's `result` for the queries, (B, N, T) or (B, N, T, H), where it belongs."""
        part = x_BNL[self.rows, :, self.tile.start : self.tile.end]
        if self.folds:
            part = part.unflatten(1, (-1, self.n_groups))
            result = result.unflatten(2, (self.n_groups, -1))
        part.copy_(result)

    def keys(self, x_BKLH: Tensor) -> Tensor:
        part = x_BKLH[self.rows, :, self.tile.first : self.tile.end]
        return part.repeat_interleave(self.n_groups, 1) if self.repeats else part

    def add(self, x_BKLH: Tensor, result: Tensor) -> None:
        """Add the kernel's gradient of the keys or values of the tile, (B, K or N, S, H), to the whole."""
        if self.repeats:
            result = result.unflatten(1, (-1, self.n_groups)).sum(2)
        x_BKLH[self.rows, :, self.tile.first : self.tile.end] += result


def every_tile(
    q_BNLH: Tensor, k_BKLH: Tensor, start_BL: Tensor | None, window: int | None, dtype: torch.dtype
) -> Iterator[TileCall]:
    n_rows, n_heads, length, _ = q_BNLH.shape
    for rows, tile in rows_of(start_BL, n_rows, length, window):
        yield TileCall(rows, tile, n_heads // k_BKLH.shape[1], dtype)


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
    for call in every_tile(q, k, start_BL, window, dtype):
        o, lse = FUSED(call.queries(q), call.keys(k), call.keys(v), scale=scale, **call.settings)
        call.write(o_BNLH, o)
        call.write(lse_BNL, lse)
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
    for call in every_tile(q, k, start_BL, window, q.dtype):
        sides = call.queries(q), call.keys(k), call.keys(v), call.queries(o), call.queries(lse_BNL)
        dq, dk, dv = FUSED_BACKWARD(call.queries(grad), *sides, scale=scale, **call.settings)
        call.write(for_q, dq)
        call.add(for_k, dk)
        call.add(for_v, dv)
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
