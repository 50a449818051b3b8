"""Forms of norms, rotations and gates for CPUs, where PyTorch computes and saves step by step what is one pass.

`core.nn.module.cpu_forms` finds them; the plain ones stand where it is asked. In training each
has its gradient written out; activation checkpointing, which computes them again, sees one operation, or `silu` where
that is one.

Letters: B rows, L length, N heads, H head width, D width that is normalised, F hidden width.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LIBRARY = torch.library.Library("armature", "FRAGMENT")
LIBRARY.define("cpu_rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define("cpu_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor reciprocal) -> (Tensor, Tensor)")
LIBRARY.define("cpu_rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
LIBRARY.define("cpu_clamped_swiglu(Tensor gate, Tensor up) -> Tensor")
RMS_NORM = torch.ops.armature.cpu_rms_norm.default
RMS_NORM_BACKWARD = torch.ops.armature.cpu_rms_norm_backward.default
ROTATE = torch.ops.armature.cpu_rotate.default
CLAMPED_SWIGLU = torch.ops.armature.cpu_clamped_swiglu.default
SUMMED_ROWS = 64
"""Tokens that are summed by one product."""
FEW_ROWS = range(4, 17)
"""Rows of a product that oneDNN multiplies faster than MKL: up to 1.8 times. Measured."""
SLOPE, LIMIT = 1.702, 7.0
"""Of GPT-OSS's gate."""
BEYOND = 7.0000005
"""The next number of fp32 after the limit."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x (..., I), without a gradient: with a weight by rows that of one row is a product with a vector,
    that of a few is oneDNN's."""
    if weight.is_contiguous() and x.dtype == weight.dtype == torch.float32:
        n_rows = x.numel() // x.shape[-1]
        if n_rows == 1:
            x_I = x.reshape(-1)
            y_O = torch.mv(weight, x_I) if bias is None else torch.addmv(bias, weight, x_I)
            return y_O.view(*x.shape[:-1], -1)
        if n_rows in FEW_ROWS and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def grouped_linear(x_RI: Tensor, weight_GOI: Tensor, bias_GO: Tensor | None, counts_G: Tensor) -> Tensor:
    """`GroupedLinear` of rows (R, I) sorted by group, (R, O), without a gradient: only groups that have rows are looked
    at; where each has one, as the experts of one token do, products are those with a vector."""
    sizes, n_rows = counts_G.tolist(), x_RI.shape[0]
    groups, used = [group for group, size in enumerate(sizes) if size], [size for size in sizes if size]
    if bias_GO is None:
        y_RO = x_RI.new_zeros(n_rows, weight_GOI.shape[1])
    else:
        y_RO = bias_GO.repeat_interleave(counts_G, dim=0, output_size=n_rows)
    if used == [1] * n_rows and x_RI.dtype == torch.float32:
        for group, x_I, y_O in zip(groups, x_RI.unbind(), y_RO.unbind(), strict=True):
            y_O.addmv_(weight_GOI[group], x_I)
    else:
        weight_GIO = weight_GOI.mT
        for group, x, y in zip(groups, x_RI.split(used), y_RO.split(used), strict=True):
            y.addmm_(x, weight_GIO[group])
    return y_RO


def rows_of_one_token(
    x_1D: Tensor, ids_1K: Tensor, weight_1K: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What `core.nn.dispatch.Local` makes of one token x (1, D) with its choices and their weights (1, K), without a
    gradient: rows (K, D), weights (K), counts (n_experts), and the way back."""
    order_1K = ids_1K.argsort()
    counts_G = torch.bincount(ids_1K[0], minlength=n_experts)
    x_KD = x_1D.expand(ids_1K.shape[1], -1).contiguous()
    return x_KD, weight_1K.gather(1, order_1K)[0], counts_G, (order_1K, order_1K)


@cache
def epsilon(value: float, dtype: torch.dtype) -> Tensor:
    """The number as a tensor ()."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension of x (..., D), in fp32 at least, returned in the dtype of x."""
    if torch.is_inference_mode_enabled():
        wide = x if x.dtype.itemsize >= 4 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        y = (wide * torch.addcmul(epsilon(eps, wide.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(weight_D)
        return y if wide is x else y.to(x.dtype)
    return RMSNorm.apply(x, weight_D, eps)


class RMSNorm(torch.autograd.Function):
    """y = x r w, (..., D), with r = 1 / rms(x). For a gradient g of y, that of w is the sum over tokens of r (g x), and
    that of x is r (g w - x c), with c = r^2 mean(g w x): the two sums are products of g x with a vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, reciprocal = RMS_NORM(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, reciprocal)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *RMS_NORM_BACKWARD(grads[0], *ctx.saved_tensors), None


def weighted_sum(x_TD: Tensor, factor: Tensor) -> Tensor:
    """The sum (D,) of the T rows of x, each times a factor: of short blocks first, or rounding errors would add up."""
    block = math.gcd(len(x_TD), SUMMED_ROWS)
    return torch.bmm(factor.reshape(-1, 1, block), x_TD.view(-1, block, x_TD.shape[1])).sum((0, 1))


@torch.library.impl(LIBRARY, "cpu_rms_norm", "CPU")
def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    reciprocal = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * reciprocal).mul_(weight_D).to(x.dtype), reciprocal


@torch.library.register_fake(RMS_NORM, lib=LIBRARY)
def _fake_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=wide)


@torch.library.impl(LIBRARY, "cpu_rms_norm_backward", "CPU")
def _rms_norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    """An operation of its own, so that its sums are not counted among the products of a model."""
    wide, width = reciprocal.dtype, weight_D.shape[0]
    grad, x_wide, w_D = grad.to(wide), x.to(wide), weight_D.to(wide)
    product_TD = (grad * x_wide).reshape(-1, width)
    mean = (product_TD @ w_D).view_as(reciprocal).mul_(reciprocal.square()).div_(width)
    for_x = (grad * w_D).addcmul_(x_wide, mean, value=-1).mul_(reciprocal)
    return for_x.to(x.dtype), weighted_sum(product_TD, reciprocal).to(weight_D.dtype)


@torch.library.register_fake(RMS_NORM_BACKWARD, lib=LIBRARY)
def _fake_rms_norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad, dtype=x.dtype), torch.empty_like(weight_D)


def rotate(x_BLNH: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair of the last dimension turned by its angle (B or 1, L, 1, H / 2), in fp32, returned in the dtype of x:
    (B, L, N, H)."""
    return Rotate.apply(x_BLNH, cos, sin, interleaved)


class Turn(NamedTuple):
    """A `Rotation` without a gradient, of fewer calls: pairs of neighbours times a complex number e^(i angle) (B or 1,
    L, 1, H / 2); of halves, the whole head (B, L, N, H) times cos, and its exchanged halves times sin, of which the
    first half is negative."""

    cos: Tensor
    sin: Tensor | None

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, interleaved: bool) -> "Turn":
        """That by angles with these cosines and sines, (B or 1, L, 1, H / 2)."""
        if interleaved:
            return cls(torch.complex(cos, sin), None)
        return cls(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    def __call__(self, x_BLNH: Tensor) -> Tensor:
        x = x_BLNH if x_BLNH.dtype == torch.float32 else x_BLNH.float()
        if self.sin is None:
            pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], -1, 2))
            turned = torch.view_as_real(pairs * self.cos).flatten(-2)
        else:
            turned = (x * self.cos).addcmul_(x.roll(x.shape[-1] // 2, -1), self.sin)
        return turned if x is x_BLNH else turned.to(x_BLNH.dtype)


class Rotate(torch.autograd.Function):
    """A pair (a, b) becomes (a cos - b sin, b cos + a sin); its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_BLNH: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return ROTATE(x_BLNH, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ROTATE(grads[0], cos, -sin, ctx.interleaved), None, None, None


@torch.library.impl(LIBRARY, "cpu_rotate", "CPU")
def _rotate(x_BLNH: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs 2i and 2i + 1 are complex numbers; of others, the exchanged halves are added to the head."""
    x = x_BLNH.to(cos.dtype)
    if interleaved:
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x_BLNH.dtype)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x, torch.cat((cos, cos), -1), out=turned)
    return turned.addcmul_(x.roll(x.shape[-1] // 2, -1), torch.cat((-sin, sin), -1)).to(x_BLNH.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any shape, saving the two alone."""
    if torch.is_inference_mode_enabled():
        return F.silu(gate).mul_(up)
    return SwiGLU.apply(gate, up)


class SwiGLU(torch.autograd.Function):
    """For a gradient g of any shape that of up is g silu(gate), that of gate is g up silu'(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (gate, up), (grad,) = ctx.saved_tensors, grads
        return torch.ops.aten.silu_backward(grad, gate).mul_(up), F.silu(gate).mul_(grad)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """g sigmoid(1.702 g) (u + 1) with g = min(gate, 7), u = clamp(up, -7, 7), of any shape, saving the two alone."""
    if torch.is_inference_mode_enabled():
        return _clamped_swiglu(gate, up)
    return ClampedSwiGLU.apply(gate, up)


class ClampedSwiGLU(torch.autograd.Function):
    """Of any shape: g sigmoid(s g) is silu(s g) / s, its derivative silu'(s g). What was clamped gets no gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return CLAMPED_SWIGLU(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (gate, up), (grad,) = ctx.saved_tensors, grads
        slope = gate.clamp(max=LIMIT).mul_(SLOPE)
        for_gate = torch.ops.aten.silu_backward(up.clamp(-LIMIT, LIMIT).add_(1).mul_(grad), slope)
        for_up = F.silu(slope, inplace=True).div_(SLOPE).mul_(grad)
        clamped = torch.ops.aten.hardtanh_backward  # zero at its limits and beyond
        beyond = math.nextafter(LIMIT, math.inf) if gate.dtype == torch.float64 else BEYOND
        return clamped(for_gate, gate, -math.inf, beyond), clamped(for_up, up, -beyond, beyond)


@torch.library.impl(LIBRARY, "cpu_clamped_swiglu", "CPU")
def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gated = F.silu(gate.clamp(max=LIMIT).mul_(SLOPE), inplace=True).div_(SLOPE)
    return gated.mul_(up.clamp(-LIMIT, LIMIT).add_(1))


@torch.library.register_fake(ROTATE, lib=LIBRARY)
@torch.library.register_fake(CLAMPED_SWIGLU, lib=LIBRARY)
def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
