"""Whether the kernels of a model can do what a run asks of them."""

from collections.abc import Iterable
from typing import Any

import torch

from core.config.errors import UserError
from core.nn.backends import KERNELS, kernel_class
from core.nn.kernel import Kernel, SelfAttention


def name_of(kernel: Kernel) -> str:
    """The name that a kernel is chosen by."""
    return next(name for name in KERNELS if kernel_class(name) is type(kernel))


def check_kernels(attentions: Iterable[SelfAttention], *, n_shares: int = 1, **asked: Any) -> None:
    """Raise `UserError` for a kernel that cannot do what its attention and the run (`asked`, fields of `KernelUse`) ask
    of it; each rank calls it with one of `n_shares` shares of the heads."""
    for attention in attentions:
        use = attention.asks._replace(**asked)
        use = use._replace(n_heads=use.n_heads // n_shares, n_kv_heads=use.n_kv_heads // n_shares)
        if problem := attention.kernel.problem(use):
            name = name_of(attention.kernel)
            raise UserError(f'attention.backend "{name}": {problem}: use --model.attention.backend sdpa')


def trains_on_cpu(attention: SelfAttention, dtype: torch.dtype) -> bool:
    """Whether the kernel of an attention trains on a CPU in `dtype`, as the plan of a run computes."""
    use = attention.asks._replace(device=torch.device("cpu"), dtype=dtype, trains=True)
    return attention.kernel.problem(use) is None
