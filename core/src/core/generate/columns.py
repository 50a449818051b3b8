"""How weights lie in memory where a CPU generates."""

import torch
from torch import Tensor, nn

from core.nn.grouped import GroupedLinear
from core.nn.layers import Embedding, Linear


def lay_by_columns(model: nn.Module) -> None:
    """Let the matrices of a model's layers lie by columns, in place, on a CPU in fp32: shapes and numbers stay.

    Of a matrix that comes from memory MKL multiplies one row 1.04 to 1.12 times as fast then, four to sixteen 1.03 to
    1.2 times as fast as any product by rows, and more no slower (docs/cpu.md). An embedding is read by rows, so the
    head that is tied to one stays as it is. While a weight moves it is there twice, one at a time.
    """
    for weight in matrices(model):
        if weight.is_cpu and weight.dtype == torch.float32:
            weight.data = by_columns(weight.data)


def max_moving_bytes(model: nn.Module) -> int:
    """The bytes in fp32 of the largest weight that `lay_by_columns` moves; the model needs no memory."""
    return max((4 * weight.numel() for weight in matrices(model)), default=0)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of layers, but that of a head which is tied to an embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    layers = [module for module in model.modules() if isinstance(module, Linear | GroupedLinear)]
    return [layer.weight for layer in layers if id(layer.weight) not in embeddings]


def by_columns(weight: Tensor) -> Tensor:
    """A copy of a weight (..., O, I) whose matrices lie by columns. PyTorch turns single matrices twice as fast
    as a stack of them."""
    laid = weight.new_empty(weight.mT.shape)
    size = weight.shape[-2:]
    for target, matrix in zip(laid.view(-1, *laid.shape[-2:]), weight.reshape(-1, *size), strict=True):
        target.copy_(matrix.mT)
    return laid.mT
