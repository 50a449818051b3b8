"""A product of two matrices whose numbers are first made others, of few bits: one mechanism for every form.

Training a layer takes three products, y = x W^T, the gradient of x, and that of W. Each has two operands, and each
operand a form (`core.quantization.forms`), scaled along the dimension that the product sums over. Sums are in fp32.

Each of the three is one operation, so that activation checkpointing counts it like the product that it stands for, and
repeats no scaling where it saves the result. Letters: M, N rows of two operands, K what is summed over; T tokens, R
rows sorted by group, G groups, I input width, O output width.
"""

from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from core.activation_checkpoint.ops import save_product
from core.activation_checkpoint.region import kept
from core.activation_checkpoint.save_output import save_output
from core.nn.grouped import to_autocast
from core.nn.product import PackedProduct
from core.quantization.forms import FORMS, Float8, cut_to, rotated, scale_of
from core.quantization.kernels import scaled_product

OPERATIONS = torch.library.Library("armature_quantization", "DEF")
WAY = "Tensor? amax_a, Tensor? amax_b, str form_a, str form_b, bool rotate, bool emulate) -> Tensor"
OPERATIONS.define(f"mm(Tensor a, Tensor b, {WAY}")
OPERATIONS.define(f"grouped_mm(Tensor x, Tensor weight, Tensor counts, {WAY}")
OPERATIONS.define(f"grouped_mm_weight(Tensor y, Tensor x, Tensor counts, {WAY}")
OPERATIONS.define("largest(Tensor x) -> Tensor")
OPS: Any = torch.ops.armature_quantization
QUANTISED_MM = save_product(OPS.mm.default, weight=1)
QUANTISED_GROUPED_MM = save_output(OPS.grouped_mm.default)
QUANTISED_GROUPED_MM_WEIGHT = OPS.grouped_mm_weight.default  # in backward only
AMAX = save_output(OPS.largest.default)


class Pair(NamedTuple):
    """The forms of a product's operands, by name; "" leaves one as it is."""

    a: str = ""
    b: str = ""
    rotate: bool = False
    """Both are turned first: see `rotated`."""


@dataclass(frozen=True, kw_only=True)
class Forms:
    """The forms of the operands of a layer's three products."""

    output: Pair
    """Of x and W in x W^T."""
    grad_input: Pair
    """Of the gradient and W^T."""
    grad_weight: Pair
    """Of the gradient and x, both transposed."""

    def __post_init__(self) -> None:
        assert all(name == "" or name in FORMS for pair in astuple(self) for name in pair[:2]), self


def needs_whole(name: str) -> bool:
    """Whether an operand's form needs the largest number of the whole tensor."""
    return name != "" and FORMS[name].whole


class QuantisedProduct(PackedProduct):
    """The products of a layer in these forms; without `emulate` by a GPU's own kernels for few bits."""

    def __init__(self, forms: Forms, *, emulate: bool, multiple: int, packs: bool = False) -> None:
        self.forms, self.emulate, self.multiple, self.packs = forms, emulate, multiple, packs

    def __repr__(self) -> str:
        return f"{self.forms} emulate={self.emulate}"

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = to_autocast(x), to_autocast(weight)
        return Multiply.apply(x.flatten(0, -2), weight, None, self).unflatten(0, x.shape[:-1])

    def grouped(self, x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
        return Multiply.apply(to_autocast(x_RI), to_autocast(weight_GOI), counts_G, self)

    def packed(self, weight: Tensor) -> Tensor:
        dtype, scale = self._weight_scale()
        return cut_to(weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale, dtype).view(torch.uint8)

    def unpacked(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        kind, scale = self._weight_scale()
        return (bits.view(kind).float() / scale).to(dtype)

    def _weight_scale(self) -> tuple[torch.dtype, Tensor]:
        form = FORMS[self.forms.output.b]
        assert isinstance(form, Float8) and form.whole and self.weight_amax is not None, "no scale of the whole weight"
        return form.dtype, scale_of(self.weight_amax, form.dtype)

    def largest(self, *asked: Tensor | None) -> list[Tensor | None]:
        """The largest absolute numbers, over all ranks, of tensors of any shape; None of what is None."""
        own = [AMAX(x) for x in asked if x is not None]
        if not own:
            return [None] * len(asked)
        with kept():  # ranks are asked once, also where the block is repeated
            found = iter(self.maximum(torch.stack(own)).unbind())
        return [None if x is None else next(found) for x in asked]


class Multiply(torch.autograd.Function):
    """y (T, O) of x (T, I) and weight (O, I), or with counts (G) rows (R, O) of (R, I) and (G, O, I)."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: Tensor, counts_G: Tensor | None, product: QuantisedProduct) -> Tensor:
        f = product.forms
        whole_x = needs_whole(f.output.a) or needs_whole(f.grad_weight.b)
        whole_weight = needs_whole(f.output.b) or needs_whole(f.grad_input.b)
        known = product.weight_amax
        amax_x, amax_weight = product.largest(
            x_TI if whole_x else None, weight if whole_weight and known is None else None
        )
        amax_weight = known if whole_weight and known is not None else amax_weight
        ctx.product = product
        ctx.save_for_backward(x_TI, weight, counts_G, amax_x, amax_weight)
        return multiply(x_TI, weight, counts_G, amax_x, amax_weight, f.output, product.emulate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TI, weight, counts_G, amax_x, amax_weight = ctx.saved_tensors
        product, (grad_TO,) = ctx.product, grads
        f, emulate = product.forms, product.emulate
        for_x, for_weight = ctx.needs_input_grad[:2]
        whole = (for_x and needs_whole(f.grad_input.a)) or (for_weight and needs_whole(f.grad_weight.a))
        (amax_grad,) = product.largest(grad_TO if whole else None)
        grad_x = grad_weight = None
        if for_x:
            grad_x = multiply(grad_TO, weight.mT, counts_G, amax_grad, amax_weight, f.grad_input, emulate)
        if for_weight and counts_G is None:
            grad_weight = multiply(grad_TO.t(), x_TI.t(), None, amax_grad, amax_x, f.grad_weight, emulate)
        elif for_weight:
            grad_weight = QUANTISED_GROUPED_MM_WEIGHT(
                grad_TO, x_TI, counts_G, amax_grad, amax_x, *f.grad_weight, emulate
            )
        return grad_x, grad_weight, None, None


def multiply(
    a: Tensor,
    b: Tensor,
    counts_G: Tensor | None,
    amax_a: Tensor | None,
    amax_b: Tensor | None,
    pair: Pair,
    emulate: bool,
) -> Tensor:
    """a (M, K) times b (N, K) transposed, or, of rows sorted by group, each times that of its group (G, N, K)."""
    way = (amax_a if needs_whole(pair.a) else None, amax_b if needs_whole(pair.b) else None, *pair, emulate)
    return QUANTISED_MM(a, b, *way) if counts_G is None else QUANTISED_GROUPED_MM(a, b, counts_G, *way)


@torch.library.impl(OPERATIONS, "mm", "CompositeExplicitAutograd")
def _mm(
    a: Tensor,
    b: Tensor,
    amax_a: Tensor | None,
    amax_b: Tensor | None,
    form_a: str,
    form_b: str,
    rotate: bool,
    emulate: bool,
) -> Tensor:
    if not emulate and form_a and form_b:
        return scaled_product(a, b, amax_a, amax_b, form_a, form_b)
    kind = torch.promote_types(a.dtype, torch.float32) if form_a or form_b else a.dtype
    left, right = a.to(kind), b.to(kind)
    if rotate:
        left, right = rotated(left), rotated(right)  # of 16 numbers up to 4 times as large
        amax_a, amax_b = (None if amax is None else 4.0 * amax for amax in (amax_a, amax_b))
    left = FORMS[form_a].quantised(left, amax_a) if form_a else left
    right = FORMS[form_b].quantised(right, amax_b) if form_b else right
    with torch.autocast(a.device.type, enabled=False):
        return (left @ right.mT).to(a.dtype)


@torch.library.impl(OPERATIONS, "grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor, *way: Any) -> Tensor:
    """Group by group into slices of the result."""
    sizes = counts_G.tolist()
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_GOI.shape[1])
    for x, weight, y in zip(x_RI.split(sizes), weight_GOI, y_RO.split(sizes), strict=True):
        if len(x):
            y.copy_(_mm(x, weight, *way))
    return y_RO


@torch.library.impl(OPERATIONS, "grouped_mm_weight", "CompositeExplicitAutograd")
def _grouped_mm_weight(y_RO: Tensor, x_RI: Tensor, counts_G: Tensor, *way: Any) -> Tensor:
    """The sum of y_r x_r^T over the rows of each group, zero for an empty one: (G, O, I)."""
    sizes = counts_G.tolist()
    weight_GOI = x_RI.new_zeros(len(sizes), y_RO.shape[1], x_RI.shape[1])
    for y, x, weight in zip(y_RO.split(sizes), x_RI.split(sizes), weight_GOI, strict=True):
        if len(x):
            weight.copy_(_mm(y.t(), x.t(), *way))
    return weight_GOI


@torch.library.impl(OPERATIONS, "largest", "CompositeExplicitAutograd")
def _largest(x: Tensor) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_zeros((), dtype=kind)
    low, high = x.aminmax()
    return torch.maximum(low.abs(), high.abs()).to(kind)


@torch.library.register_fake(QUANTISED_MM, lib=OPERATIONS)
def _fake_mm(a: Tensor, b: Tensor, *way: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


@torch.library.register_fake(QUANTISED_GROUPED_MM, lib=OPERATIONS)
def _fake_grouped_mm(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor, *way: Any) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_GOI.shape[1])


@torch.library.register_fake(QUANTISED_GROUPED_MM_WEIGHT, lib=OPERATIONS)
def _fake_grouped_mm_weight(y_RO: Tensor, x_RI: Tensor, counts_G: Tensor, *way: Any) -> Tensor:
    return x_RI.new_empty(counts_G.shape[0], y_RO.shape[1], x_RI.shape[1])


@torch.library.register_fake(AMAX, lib=OPERATIONS)
def _fake_largest(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))


@register_flop_formula([OPS.mm, OPS.grouped_mm, OPS.grouped_mm_weight])
def _flops(left: tuple[int, int], *shapes: Any, out_shape: tuple[int, ...], **settings: Any) -> int:
    """Two for each entry of the left operand and column of the result, as of plain products."""
    return 2 * left[0] * left[1] * out_shape[-1]
