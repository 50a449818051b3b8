"""Frozen weights of 4 bits: NF4, of QLoRA (arXiv:2305.14314, sections 3 and appendix E).

64 numbers of a row are a block. Of each the largest absolute number is kept in fp32, and for every number which of 16
levels from -1 to 1 is nearest to it, divided by that. The levels are quantiles of the normal distribution, of which
trained weights are drawn as good as. So a weight (..., O, I) becomes bytes (..., O, 36 I / 64): an eighth of fp32.

They are one tensor under the weight's name and axes, so that layouts cut and gather them as any weight, at blocks. A
product makes numbers of them for as long as it takes, in backward again. Letters: T tokens, R rows sorted by group, G
groups, I input width, O output width, C = 36 I / 64 bytes of a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from core.activation_checkpoint.ops import save_product
from core.activation_checkpoint.save_output import save_output
from core.nn.grouped import GroupedLinear, grouped_mm, to_autocast
from core.nn.layers import Linear
from core.nn.product import Product
from core.nn.start import Start
from core.nn.weights import NF4_BLOCK, NF4_BLOCK_BYTES

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38
"""What the largest number of a block counts as at least when it is divided by."""

LIBRARY = torch.library.Library("armature", "FRAGMENT")
LIBRARY.define("nf4_mm(Tensor x, Tensor weight, bool transposed) -> Tensor")
LIBRARY.define("nf4_grouped_mm(Tensor x, Tensor weight, Tensor counts, bool transposed) -> Tensor")
NF4_MM = save_product(torch.ops.armature.nf4_mm.default, weight=1)
NF4_GROUPED_MM = save_output(torch.ops.armature.nf4_grouped_mm.default)


def to_nf4(values: Tensor) -> Tensor:
    """The bytes (..., C) of numbers (..., I): two levels in a byte, the first in its upper half, then the scale."""
    blocks = values.float().unflatten(-1, (-1, NF4_BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    table = torch.tensor(LEVELS, device=values.device)
    middles = (table[1:] + table[:-1]) / 2
    levels = torch.bucketize(blocks * (1.0 / amax.clamp(min=SMALLEST)), middles).to(torch.uint8).unflatten(-1, (-1, 2))
    return torch.cat((levels[..., 0] << 4 | levels[..., 1], amax.view(torch.uint8)), -1).flatten(-2)


def from_nf4(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers (..., I) of bytes (..., C)."""
    blocks = weight.unflatten(-1, (-1, NF4_BLOCK_BYTES))
    pairs, amax = blocks[..., : NF4_BLOCK // 2], blocks[..., NF4_BLOCK // 2 :].contiguous().view(torch.float32)
    levels = torch.stack((pairs >> 4, pairs & 15), -1).flatten(-2)
    return (torch.tensor(LEVELS, device=weight.device)[levels.int()] * amax).flatten(-2).to(dtype)


class NF4Product(Product):
    """The plain product with a weight that is kept in these bytes, and has no gradient."""

    def __repr__(self) -> str:
        return "NF4Product()"

    def numbers(self, weight: Tensor) -> Tensor:
        return from_nf4(weight, torch.float32)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return NF4_MM(to_autocast(x).flatten(0, -2), weight, False).unflatten(0, x.shape[:-1])

    def grouped(self, x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
        return NF4_GROUPED_MM(to_autocast(x_RI), weight_GOI, counts_G, False)


class StartInNF4(NamedTuple):
    """A weight in these bytes, whose numbers begin like those of a plain one."""

    plain: Start

    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill bytes `out` (..., C)."""
        values = torch.empty(*out.shape[:-1], out.shape[-1] // NF4_BLOCK_BYTES * NF4_BLOCK, device=out.device)
        self.plain.draw(values, generator)
        out.copy_(to_nf4(values))


def keep_in_nf4(layer: Linear | GroupedLinear) -> None:
    """Have a layer, which has no memory yet and whose product is an `NF4Product`, keep its weight in these bytes."""
    *rows, n_in = layer.weight.shape
    stored = torch.empty(*rows, n_in // NF4_BLOCK * NF4_BLOCK_BYTES, dtype=torch.uint8, device=layer.weight.device)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    start: Any = layer.start
    start["weight"] = StartInNF4(start["weight"])


@torch.library.impl(LIBRARY, "nf4_mm", "CompositeExplicitAutograd")
def _mm(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """x (T, I) times the weight (O, C) transposed, or x (T, O) times it."""
    numbers = from_nf4(weight, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return x @ (numbers if transposed else numbers.t())


@torch.library.impl(LIBRARY, "nf4_grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Each row, of x (R, I) or (R, O), times the matrix of its group, of (G, O, C)."""
    numbers = from_nf4(weight, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return grouped_mm(x, numbers.mT if transposed else numbers, counts)


def _fake(x: Tensor, weight: Tensor, *way: Any) -> Tensor:
    n_out = weight.shape[-1] // NF4_BLOCK_BYTES * NF4_BLOCK if way[-1] else weight.shape[-2]
    return x.new_empty(x.shape[0], n_out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *operands, ctx.transposed = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    product = NF4_MM if len(operands) == 1 else NF4_GROUPED_MM
    return product(grad, *operands, not ctx.transposed), *(None for _ in operands), None


for _op in (NF4_MM, NF4_GROUPED_MM):
    torch.library.register_fake(_op, lib=LIBRARY)(_fake)
    torch.library.register_autograd(_op, _backward, setup_context=_keep, lib=LIBRARY)


@register_flop_formula([torch.ops.armature.nf4_mm, torch.ops.armature.nf4_grouped_mm])
def _flops(left: tuple[int, int], *shapes: Any, out_shape: tuple[int, ...], **settings: Any) -> int:
    """Two for each entry of the left operand and column of the result, as of plain products."""
    return 2 * left[0] * left[1] * out_shape[-1]
