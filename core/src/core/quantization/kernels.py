"""Products by a GPU's own kernels for numbers of 8 bits: `torch._scaled_mm`, from Ada (compute capability 8.9) on."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.quantization.forms import FORMS, Float8
from core.runtime.device import n_gpus

MULTIPLE = 16
"""The kernels take operands whose sizes are multiples of this."""
CAPABILITY = (8, 9)


def device_problem(device: torch.device, format_name: str) -> str:
    """Why a device has no kernels for 8 bits; empty where it has, or where a GPU is planned for that is not here."""
    if device.type == "cpu":
        return (
            f"{format_name} needs a GPU of compute capability 8.9, and this is a cpu: set emulate to compute the same"
        )
    if device.type != "cuda":
        return f"{format_name} has no kernels for {device.type}: set emulate to compute the same"
    if n_gpus() and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{format_name} needs compute capability 8.9, this GPU has {found[0]}.{found[1]}: set emulate"
    return ""


def scaled_product(
    a: Tensor, b: Tensor, amax_a: Tensor | None, amax_b: Tensor | None, form_a: str, form_b: str
) -> Tensor:
    """a (M, K) times b (N, K) transposed, both as numbers of 8 bits."""
    left, right = FORMS[form_a], FORMS[form_b]
    assert isinstance(left, Float8) and isinstance(right, Float8), f"no kernel for {form_a} and {form_b}"
    if missing := -a.shape[1] % MULTIPLE:
        a, b = F.pad(a, (0, missing)), F.pad(b, (0, missing))
    bits_a, scale_a = left.encoded(a.float(), amax_a)
    bits_b, scale_b = right.encoded(b.float(), amax_b)
    if left.whole != right.whole:  # the kernels want both scaled alike
        scale_a, scale_b = scale_a.expand(len(a), 1), scale_b.expand(len(b), 1)
    out = torch.bfloat16 if scale_a.dim() else a.dtype
    product = torch._scaled_mm(
        bits_a.contiguous(),
        bits_b.contiguous().t(),
        scale_a=scale_a.reciprocal().contiguous(),
        scale_b=scale_b.reciprocal().t().contiguous() if scale_b.dim() else scale_b.reciprocal(),
        out_dtype=out,
    )
    return product.to(a.dtype)
