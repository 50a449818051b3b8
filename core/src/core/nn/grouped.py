"""The product of groups of rows with one matrix per group: what the experts of a mixture compute.

Letters: R rows, sorted by group; G groups; I input width, O output width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from core.activation_checkpoint.save_output import save_output
from core.nn.module import Module, inference_forms
from core.nn.start import Constant, Normal

LIBRARY = torch.library.Library("armature", "FRAGMENT")  # custom_op would import torch._dynamo at its first call
LIBRARY.define("grouped_mm(Tensor x, Tensor weight, Tensor counts) -> Tensor")
LIBRARY.define("grouped_mm_weight(Tensor y, Tensor x, Tensor counts) -> Tensor")
GROUPED_MM = save_output(torch.ops.armature.grouped_mm.default)
GROUPED_MM_WEIGHT = torch.ops.armature.grouped_mm_weight.default  # the gradient of the weight: in backward only


def grouped_mm(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
    """Each row times the matrix of its group, (R, O): the first `counts_G[0]` rows belong to group 0, and so on.

    `counts_G` (int64) adds up to R; any groups may be empty. Under autocast its dtype is computed in, as by `F.linear`.
    GPUs from Hopper on have a kernel for bf16; elsewhere `counts_G` is read by the host, and a group is a product.
    """
    x_RI, weight_GOI = to_autocast(x_RI), to_autocast(weight_GOI)
    if _has_kernel(x_RI, weight_GOI):
        return torch._grouped_mm(x_RI, weight_GOI.mT, offs=counts_G.cumsum(0, dtype=torch.int32))
    return GROUPED_MM(x_RI, weight_GOI, counts_G)


class GroupedLinear(Module):
    """A Linear for each group of rows: weight (G, O, I), bias (G, O).

    Its parent names the axes, and counts the FLOPs: it alone knows how many groups a token meets.
    """

    def __init__(self, n_groups: int, n_in: int, n_out: int, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_groups, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_groups, n_out)) if bias else None
        self.start = {"weight": Normal(std), "bias": Constant(0.0)}
        self.n_numbers = n_groups * n_out * n_in

    def forward(self, x_RI: Tensor, counts_G: Tensor) -> Tensor:
        if (forms := inference_forms(x_RI)) and type(counts_G) is Tensor:  # a fake one has no numbers
            return forms.grouped_linear(x_RI, self.weight, self.bias, counts_G)
        return self._with_bias(grouped_mm(x_RI, self.weight, counts_G), counts_G)

    def _with_bias(self, y_RO: Tensor, counts_G: Tensor) -> Tensor:
        if self.bias is None:
            return y_RO
        # Copied to the rows in fp32 at least: the gradient is their sum, and a GPU adds rows of bf16 up in bf16.
        bias_GO = self.bias.to(torch.promote_types(self.bias.dtype, torch.float32))
        return y_RO + bias_GO.repeat_interleave(counts_G, dim=0, output_size=y_RO.shape[0]).to(y_RO.dtype)


def to_autocast(tensor: Tensor) -> Tensor:
    """The tensor, of any shape, in the dtype that autocast asks of a matrix product; fp64 it leaves alone."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device):  # autocast knows no meta
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))


def _has_kernel(x_RI: Tensor, weight_GOI: Tensor) -> bool:
    """Whether PyTorch's grouped kernel takes these: bf16 in rows of whole 16 bytes, on a GPU of Hopper or later."""
    return (
        x_RI.is_cuda
        and x_RI.dtype == torch.bfloat16
        and weight_GOI.shape[1] % 8 == weight_GOI.shape[2] % 8 == 0
        and torch.cuda.get_device_properties(x_RI.device).major >= 9
    )


@torch.library.impl(LIBRARY, "grouped_mm", "CompositeExplicitAutograd")
def _multiply(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
    """y_r = W_g x_r, group by group into slices of the result; most groups are empty where tokens are few."""
    sizes = counts_G.tolist()
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_GOI.shape[1])
    for x, weight, y, n_rows in zip(x_RI.split(sizes), weight_GOI, y_RO.split(sizes), sizes, strict=True):
        if n_rows:
            torch.mm(x, weight.t(), out=y)
    return y_RO


@torch.library.impl(LIBRARY, "grouped_mm_weight", "CompositeExplicitAutograd")
def _multiply_weight(y_RO: Tensor, x_RI: Tensor, counts_G: Tensor) -> Tensor:
    """W_g = the sum of y_r x_r^T over the rows of the group, zero for an empty one: (G, O, I)."""
    sizes = counts_G.tolist()
    weight_GOI = x_RI.new_empty(len(sizes), y_RO.shape[1], x_RI.shape[1])
    for y, x, weight in zip(y_RO.split(sizes), x_RI.split(sizes), weight_GOI, strict=True):
        torch.mm(y.t(), x, out=weight)
    return weight_GOI


@torch.library.register_fake(GROUPED_MM, lib=LIBRARY)
def _fake(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_GOI.shape[1])


@torch.library.register_fake(GROUPED_MM_WEIGHT, lib=LIBRARY)
def _fake_weight(y_RO: Tensor, x_RI: Tensor, counts_G: Tensor) -> Tensor:
    return x_RI.new_empty(counts_G.shape[0], y_RO.shape[1], x_RI.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RI, weight_GOI, counts_G = ctx.saved_tensors
    for_x, for_weight, _ = ctx.needs_input_grad
    grad_RI = GROUPED_MM(grad_RO, weight_GOI.mT, counts_G) if for_x else None
    grad_GOI = GROUPED_MM_WEIGHT(grad_RO, x_RI, counts_G) if for_weight else None
    return grad_RI, grad_GOI, None


def _backward_weight(ctx: Any, grad_GOI: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    y_RO, x_RI, counts_G = ctx.saved_tensors
    for_y, for_x, _ = ctx.needs_input_grad
    grad_RO = GROUPED_MM(x_RI, grad_GOI, counts_G) if for_y else None
    grad_RI = GROUPED_MM(y_RO, grad_GOI.mT, counts_G) if for_x else None
    return grad_RO, grad_RI, None


torch.library.register_autograd(GROUPED_MM, _backward, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd(GROUPED_MM_WEIGHT, _backward_weight, setup_context=_keep, lib=LIBRARY)


@register_flop_formula([torch.ops.armature.grouped_mm, torch.ops.armature.grouped_mm_weight])
def _flops(left: tuple[int, int], *shapes: Any, out_shape: tuple[int, ...], **settings: Any) -> int:
    """Two for each entry of the left operand and column of the result: a row meets one group."""
    return 2 * left[0] * left[1] * out_shape[-1]


flop_registry.setdefault(torch.ops.aten._grouped_mm, _flops)  # torch 2.11 to 2.13 count nothing for it
