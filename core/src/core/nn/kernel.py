"""Which keys a query may see, and the kernels that attend to them.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.errors import UserError

MaskMod = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
Mask = Any
"""What an attention kernel takes for a mask: None (causal), a bool tensor (B or 1, 1, L, M), or flex's BlockMask."""


class Where(NamedTuple):
    """Where the tokens of a batch stand. A tensor whose first axis is 1 says that all rows are alike.

    `position_BL` is the place in the document, `document_BL` the document of each token (None: a row is one document),
    `index_BL` the place in the row where that is not 0, 1, 2, ... The last two say the same of the keys where these are
    not the tokens themselves, because some were computed earlier or elsewhere.
    """

    position_BL: Tensor
    document_BL: Tensor | None = None
    index_BL: Tensor | None = None
    key_index_BM: Tensor | None = None
    key_document_BM: Tensor | None = None

    @classmethod
    def rows(cls, tokens_BL: Tensor) -> "Where":
        """Every row is one document that starts at position 0."""
        return cls(torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None])

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows that differ, queries, keys."""
        keys = self.position_BL if self.key_index_BM is None else self.key_index_BM
        n_rows = max(len(tensor) for tensor in self[1:] if tensor is not None) if any_given(self[1:]) else 1
        return n_rows, self.position_BL.shape[1], keys.shape[1]

    @property
    def is_plain(self) -> bool:
        """Whether rows are single documents and the keys are the tokens, in their order."""
        return not any_given(self[1:])


def any_given(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether one of them is not None."""
    return any(tensor is not None for tensor in tensors)


def visible(where: Where, window: int | None = None) -> MaskMod:
    """The rule (row, head, query, key) -> may look.

    Causal; within the document if there are several; and not further back than `window` tokens, itself included.
    """
    keys_have_documents = where.key_index_BM is not None and where.document_BL is not None
    assert keys_have_documents == (where.key_document_BM is not None), "key_document goes with key_index and document"
    n_rows, _, _ = where.grid
    index, key_index, document, key_document = (
        None if tensor is None else tensor.expand(n_rows, -1)
        for tensor in (
            where.index_BL,
            where.index_BL if where.key_index_BM is None else where.key_index_BM,
            where.document_BL,
            where.document_BL if where.key_document_BM is None else where.key_document_BM,
        )
    )

    def rule(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        row = row if n_rows > 1 else torch.zeros_like(row)  # flex counts the rows of the queries, however alike
        at = query if index is None else index[row, query]
        key_at = key if key_index is None else key_index[row, key]
        seen = key_at <= at
        if window is not None:
            seen = seen & (at - key_at < window)
        if document is not None and key_document is not None:
            seen = seen & (document[row, query] == key_document[row, key])
        return seen

    return rule


@dataclass(frozen=True)
class SDPA:
    """PyTorch's scaled_dot_product_attention: the reference on every device."""

    window: int | None = None

    def check_trains_on(self, device: torch.device) -> None:
        """It does everywhere."""

    def mask(self, where: Where) -> Mask:
        """None where the causal flag of the kernel says it all, else the rule on the grid of rows, queries and keys."""
        n_rows, n_queries, n_keys = where.grid
        if where.is_plain and (self.window is None or self.window >= n_queries):
            return None
        row, query, key = (torch.arange(n, device=where.position_BL.device) for n in (n_rows, n_queries, n_keys))
        rule = visible(where, self.window)
        return rule(row[:, None, None], None, query[None, :, None], key[None, None, :])[:, None]

    def __call__(
        self,
        q_BNLH: Tensor,
        k_BKMH: Tensor,
        v_BKMH: Tensor,
        mask: Mask,
        *,
        scale: float,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        assert mask is not None or q_BNLH.shape[2] == k_BKMH.shape[2], "no mask, and the keys are not the tokens"
        v_dim = v_BKMH.shape[-1]
        if sinks_N is not None:
            q_BNLH, k_BKMH, v_BKMH, mask = with_sinks(q_BNLH, k_BKMH, v_BKMH, mask, sinks_N / scale)
        if q_BNLH.is_cpu and v_BKMH.shape[-1] < q_BNLH.shape[-1]:  # the fused kernel of a CPU wants one width
            v_BKMH = F.pad(v_BKMH, (0, q_BNLH.shape[-1] - v_BKMH.shape[-1]))
        grouped = q_BNLH.shape[1] != k_BKMH.shape[1]
        o_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BKMH, v_BKMH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scale
        )
        return o_BNLH[..., :v_dim]


def with_sinks(
    q_BNLH: Tensor, k_BKMH: Tensor, v_BKMH: Tensor, mask: Mask, logit_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """Queries, keys, values and mask with one key more, whose product with a query of head n is `logit_N[n]`.

    Every query sees it and takes nothing from it, so that the softmax's denominator has one learned term more, and
    fused kernels compute it:

        q' = [q, logit, 0...]    k' = [k, 0, 0...], and last [0, 1, 0...]    v' = [v, 0...], and last 0

    The width grows by eight because kernels want rows of whole 16 bytes.
    """
    n_queries, n_keys = q_BNLH.shape[2], k_BKMH.shape[2]
    extra_BNL8 = F.pad(logit_N.to(q_BNLH.dtype).view(1, -1, 1, 1), (0, 7)).expand(*q_BNLH.shape[:3], 8)
    k_BKMH, v_BKMH = F.pad(k_BKMH, (0, 8, 0, 1)), F.pad(v_BKMH, (0, 8, 0, 1))
    sink_M8 = torch.zeros(n_keys + 1, 8, dtype=k_BKMH.dtype, device=k_BKMH.device)
    sink_M8[-1, 0] = 1.0
    k_BKMH = k_BKMH + F.pad(sink_M8, (k_BKMH.shape[-1] - 8, 0))
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q_BNLH.device).tril()[None, None]
    return torch.cat((q_BNLH, extra_BNL8), -1), k_BKMH, v_BKMH, F.pad(mask, (0, 1), value=True)


@dataclass(frozen=True)
class Flex:
    """PyTorch's flex_attention: skips masked blocks; compiled on an accelerator, no backward on a CPU.

    Inside a compiled block the block's compiler sees the plain function.
    """

    window: int | None = None

    def check_trains_on(self, device: torch.device) -> None:
        """Raise `UserError` on a CPU, where PyTorch 2.13 has no backward for it."""
        if device.type == "cpu":
            raise UserError('attention.backend "flex" cannot train on a cpu: use --model.attention.backend sdpa')

    def mask(self, where: Where) -> Mask:
        from torch.nn.attention.flex_attention import create_block_mask

        n_rows, n_queries, n_keys = where.grid
        rows = None if n_rows == 1 else n_rows
        rule = visible(where, self.window)
        return create_block_mask(rule, rows, None, n_queries, n_keys, device=where.position_BL.device)

    def __call__(
        self,
        q_BNLH: Tensor,
        k_BKMH: Tensor,
        v_BKMH: Tensor,
        mask: Mask,
        *,
        scale: float,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        plain = q_BNLH.device.type == "cpu" or torch.compiler.is_compiling()
        attend = flex_attention if plain else _compiled(flex_attention)
        grouped = q_BNLH.shape[1] != k_BKMH.shape[1]
        if sinks_N is None:
            return attend(q_BNLH, k_BKMH, v_BKMH, block_mask=mask, enable_gqa=grouped, scale=scale)
        o_BNLH, aux = attend(
            q_BNLH, k_BKMH, v_BKMH, block_mask=mask, enable_gqa=grouped, scale=scale, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        # One term e^sink more in the denominator: o e^lse / (e^lse + e^sink).
        return o_BNLH * torch.sigmoid(aux.lse - sinks_N[:, None]).unsqueeze(-1).to(o_BNLH.dtype)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


Kernel = SDPA | Flex
KERNELS: dict[str, type[Kernel]] = {"sdpa": SDPA, "flex": Flex}


class Keys(torch.nn.Module):
    """The key side of attention: what is given. Who holds more keys than these, from earlier or from elsewhere, hooks
    this module; so an attention calls it where its key side is smallest.
    """

    def forward(self, *sides: Tensor) -> tuple[Tensor, ...]:
        return sides
