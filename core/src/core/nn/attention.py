"""Grouped-query attention, and the one statement of which keys a query may see.

Letters: B rows, L length, D width, N query heads, K key/value heads, H head width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.nn.init import Scale
from core.nn.layers import Linear, RMSNorm
from core.nn.module import Flops, Module
from core.nn.rope import Rotation

MaskMod = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
Mask = Any
"""What an attention kernel takes for a mask: None (causal), a bool tensor (B, 1, L, L), or flex's BlockMask."""


class Where(NamedTuple):
    """Where the tokens of a batch stand: `position_BL` in their document, and `document_BL`, the document of each.

    Positions of shape (1, L) say that all rows are alike; documents of None say that every row is one document.
    """

    position_BL: Tensor
    document_BL: Tensor | None = None

    @classmethod
    def rows(cls, tokens_BL: Tensor) -> "Where":
        """Every row is one document that starts at position 0."""
        return cls(torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None])


def visible(where: Where) -> MaskMod:
    """The rule (row, head, query, key) -> may look: causal, and within the document if there are several."""
    document_BL = where.document_BL

    def rule(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if document_BL is not None:
            seen = seen & (document_BL[row, query] == document_BL[row, key])
        return seen

    return rule


class SDPA:
    """PyTorch's scaled_dot_product_attention: the reference on every device."""

    def check_trains_on(self, device: torch.device) -> None:
        """It does everywhere."""

    def mask(self, where: Where) -> Mask:
        """None where the causal flag of the kernel says it all, else the rule on the grid of rows, queries and keys."""
        if where.document_BL is None:
            return None
        n_rows, length = where.document_BL.shape
        row = torch.arange(n_rows, device=where.document_BL.device)
        index = torch.arange(length, device=where.document_BL.device)
        return visible(where)(row[:, None, None], None, index[None, :, None], index[None, None, :])[:, None]

    def __call__(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask: Mask) -> Tensor:
        grouped = q_BNLH.shape[1] != k_BKLH.shape[1]
        return F.scaled_dot_product_attention(
            q_BNLH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )


class Flex:
    """PyTorch's flex_attention: skips masked blocks; compiled on an accelerator, no backward on a CPU.

    Inside a compiled block the block's compiler sees the plain function.
    """

    def check_trains_on(self, device: torch.device) -> None:
        """Raise `UserError` on a CPU, where PyTorch 2.13 has no backward for it."""
        if device.type == "cpu":
            raise UserError('attention.backend "flex" cannot train on a cpu: use --model.attention.backend sdpa')

    def mask(self, where: Where) -> Mask:
        from torch.nn.attention.flex_attention import create_block_mask

        length = where.position_BL.shape[1]
        rows = None if where.document_BL is None else where.document_BL.shape[0]
        return create_block_mask(visible(where), rows, None, length, length, device=where.position_BL.device)

    def __call__(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask: Mask) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        plain = q_BNLH.device.type == "cpu" or torch.compiler.is_compiling()
        attend = flex_attention if plain else _compiled(flex_attention)
        return attend(q_BNLH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=q_BNLH.shape[1] != k_BKLH.shape[1])


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


KERNELS = {"sdpa": SDPA(), "flex": Flex()}


class Attention(Module, Configurable):
    """Causal self-attention whose key/value heads are each shared by a group of query heads (arXiv:2305.13245)."""

    AXES = {
        "wq": ("heads", "embed"),
        "wk": ("heads", "embed"),
        "wv": ("heads", "embed"),
        "wo": ("embed", "heads"),
        "q_norm": ("head",),
        "k_norm": ("head",),
    }

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
        backend: Literal["sdpa", "flex"] = "sdpa"
        """Attention kernel: PyTorch's scaled_dot_product_attention, or flex_attention (training needs a GPU)."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.n_heads < 1:
                yield "n_heads", f"n_heads {self.n_heads} must be at least 1"
            elif self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
                fits = ", ".join(str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0)
                yield "n_kv_heads", f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}: use {fits}"
            if self.head_dim < 2 or self.head_dim % 2:
                yield "head_dim", f"head_dim {self.head_dim} must be even: rotary embedding turns pairs"

    def __init__(self, config: Config, *, dim: int, norm_eps: float, scale: Scale) -> None:
        super().__init__()
        self.head_dim, self.n_heads = config.head_dim, config.n_heads
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(dim, q_dim, std=scale.std)
        self.wk = Linear(dim, kv_dim, std=scale.std)
        self.wv = Linear(dim, kv_dim, std=scale.std)
        self.wo = Linear(q_dim, dim, std=scale.residual)
        self.q_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.kernel = KERNELS[config.backend]

    def forward(self, x_BLD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        q_BLNH, k_BLKH, v_BLKH = (w(x_BLD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNH, k_BLKH = self.q_norm(q_BLNH), self.k_norm(k_BLKH)
        q_BLNH, k_BLKH = rotation(q_BLNH), rotation(k_BLKH)
        o_BNLH = self.kernel(q_BLNH.transpose(1, 2), k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2), mask)
        return self.wo(o_BNLH.transpose(1, 2).flatten(-2))

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(attention=4 * self.n_heads * self.head_dim * seq_len)
