"""The smallest parts: Linear, Embedding, RMSNorm.

Letters: I input width, O output width, V vocabulary, D width of the residual stream.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.nn.module import Flops, Module, cpu_forms, inference_forms
from core.nn.start import Constant, Normal


class Linear(Module):
    """y (..., O) = x (..., I) W^T (+ b); weight (O, I), of standard deviation `std`; its parent names the axes."""

    def __init__(self, n_in: int, n_out: int, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.start = {"weight": Normal(std), "bias": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        if forms := inference_forms(x):
            return forms.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(matmul=2 * self.weight.numel())


class Head(Linear):
    """The language-model head: logits over the vocabulary, weight (V, D)."""

    AXES = {"weight": ("vocab", "embed")}

    def forward(self, x: Tensor, read: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits (..., V) of x (..., D), or what `read` makes of x and the weight, which is there while it runs."""
        return super().forward(x) if read is None else read(x, self.weight)


class Embedding(Module):
    """A row of `weight` (V, D) for each token id."""

    AXES = {"weight": ("vocab", "embed")}

    def __init__(self, vocab_size: int, dim: int, *, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.start = {"weight": Normal(std)}

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.weight)


class RMSNorm(Module):
    """x / rms(x) * weight over the last dimension of x (..., D) (arXiv:1910.07467), starting at ones; its parent names
    the axis.

    The result has the dtype of x, not the fp32 of autocast on CUDA, so that a kernel behind it sees one dtype.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.start = {"weight": Constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        weight_D = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        if forms := cpu_forms(x):
            return forms.rms_norm(x, weight_D, self.eps)
        return F.rms_norm(x, weight_D.shape, weight_D, self.eps).to(x.dtype)
