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
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    for module in model.modules():
        if isinstance(module, Linear | GroupedLinear) and id(module.weight) not in embeddings:
            weight = module.weight.data
            if weight.is_cpu and weight.dtype == torch.float32:
                module.weight.data = by_columns(weight)


def by_columns(weight: Tensor) -> Tensor:
    """A copy of a weight (..., O, I) whose matrices lie by columns. PyTorch turns single matrices twice as fast
    as a stack of them."""
    laid = weight.new_empty(weight.mT.shape)
    size = weight.shape[-2:]
    for target, matrix in zip(laid.view(-1, *laid.shape[-2:]), weight.reshape(-1, *size), strict=True):
        target.copy_(matrix.mT)
    return laid.mT
