"""Grouped-query attention.

Letters: B rows, L length, M length of the keys, D width, N query heads, K key/value heads, H head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.config.configurable import Configurable
from core.nn.backends import backend_problems, kernel_class
from core.nn.kernel import KernelUse, KeyValues, Mask, SelfAttention
from core.nn.layers import Linear, RMSNorm
from core.nn.module import Flops, size_problems
from core.nn.rope import Rotation
from core.nn.start import Normal, Scale


class Attention(SelfAttention, Configurable):
    """Causal self-attention whose key/value heads are each shared by a group of query heads (arXiv:2305.13245)."""

    AXES = {
        "wq": ("heads", "embed"),
        "wk": ("heads", "embed"),
        "wv": ("heads", "embed"),
        "wo": ("embed", "heads"),
        "q_norm": ("head",),
        "k_norm": ("head",),
        "sinks": ("heads",),
    }

    SIZED_BY = {"heads": ("n_heads", "n_kv_heads")}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        n_heads: int
        """Number of query heads."""
        n_kv_heads: int
        """Number of key/value heads; each serves n_heads / n_kv_heads query heads."""
        head_dim: int
        """Width of one head."""
        qk_norm: bool = False
        """Normalise queries and keys per head before rotation (arXiv:2302.05442)."""
        bias: bool = False
        """Add a bias to queries, keys, values and output."""
        output_bias: bool = True
        """The output has one, too, where `bias` adds them."""
        sinks: bool = False
        """One learned logit per head joins the softmax's denominator (arXiv:2309.17453)."""
        window: int | None = None
        """A token sees so many tokens at most, itself included; all before it when None."""
        backend: str = "sdpa"
        """Attention kernel: sdpa (PyTorch's scaled_dot_product_attention), flex (flex_attention; training needs a GPU),
        varlen (varlen_attn; needs a GPU), or one that a file of yours registers."""

        def problems(self) -> Iterator[tuple[str, str]]:
            wrong = dict(size_problems(self, "n_heads", "head_dim"))
            yield from wrong.items()
            if "n_heads" not in wrong and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
                fits = ", ".join(str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0)
                yield "n_kv_heads", f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}: use {fits}"
            if "head_dim" not in wrong and self.head_dim % 2:
                yield "head_dim", f"head_dim {self.head_dim} must be even: rotary embedding turns pairs"
            if self.window is not None and self.window < 1:
                yield "window", f"window {self.window} must be at least 1, or None"
            yield from backend_problems(self.backend)

    def __init__(self, config: Config, *, dim: int, norm_eps: float, scale: Scale) -> None:
        super().__init__()
        self.head_dim, self.n_heads = config.head_dim, config.n_heads
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(dim, q_dim, std=scale.std, bias=config.bias)
        self.wk = Linear(dim, kv_dim, std=scale.std, bias=config.bias)
        self.wv = Linear(dim, kv_dim, std=scale.std, bias=config.bias)
        self.wo = Linear(q_dim, dim, std=scale.residual, bias=config.bias and config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(config.n_heads)) if config.sinks else None
        self.start = {"sinks": Normal(scale.std)}
        self.keys = KeyValues()
        self.kernel = kernel_class(config.backend)(config.window)
        self.asks = KernelUse(
            config.n_heads, config.n_kv_heads, config.head_dim, config.head_dim, sinks=self.sinks is not None
        )

    def forward(self, x_BLD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        heads = *x_BLD.shape[:-1], -1, self.head_dim
        q_BLNH, k_BLKH, v_BLKH = (w(x_BLD).view(heads) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNH, k_BLKH = self.q_norm(q_BLNH), self.k_norm(k_BLKH)
        q_BLNH, k_BLKH = rotation(q_BLNH), rotation(k_BLKH)
        k_BMKH, v_BMKH = self.keys(k_BLKH, v_BLKH)
        q_BNLH, k_BKMH, v_BKMH = (side.transpose(1, 2) for side in (q_BLNH, k_BMKH, v_BMKH))
        o_BNLH = self.kernel(q_BNLH, k_BKMH, v_BKMH, mask, scale=self.head_dim**-0.5, sinks_N=self.sinks)
        return self.wo(o_BNLH.transpose(1, 2).flatten(-2))

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(attention=4 * self.n_heads * self.head_dim * seq_len)
