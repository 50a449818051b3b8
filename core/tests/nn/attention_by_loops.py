"""Attention by its definition: loops over rows, heads, queries and keys, in double precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from core.nn.kernel import Positions
from core.nn.tiling import rows_of


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positions(*lengths: int) -> list[int]:
    return [position for length in lengths for position in range(length)]


def documents(*lengths: int) -> list[int]:
    return [number for number, length in enumerate(lengths) for _ in range(length)]


CAUSAL = Positions(torch.arange(12)[None])
PACKED = Positions(
    torch.tensor([positions(3, 1, 8), positions(7, 5)]),
    torch.tensor([documents(3, 1, 8), documents(7, 5)]),
)
ORDER = torch.tensor([[0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]])
LATER = torch.tensor([[3, 4, 5, 6]])
PADDED = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 12])
WHERES = {
    "causal": CAUSAL,
    "documents": PACKED,
    "rows alike": Positions(PACKED.position_BL[:1], PACKED.document_BL[:1]),
    "another order": Positions(ORDER, index_BL=ORDER),
    "another order of documents": Positions(
        PACKED.position_BL.gather(1, ORDER.expand(2, -1)), PACKED.document_BL.gather(1, ORDER.expand(2, -1)), ORDER
    ),
    "earlier keys": Positions(torch.tensor([[9, 10, 11]]), None, torch.tensor([[9, 10, 11]]), torch.arange(12)[None]),
    "earlier keys and pads": Positions(
        torch.tensor([[8, 9], [10, 11]]),
        PADDED[:, 10:],
        torch.tensor([[10, 11]]),
        torch.arange(12)[None],
        PADDED,
    ),
    "keys from elsewhere": Positions(LATER, None, LATER, ORDER),
    "keys of documents from elsewhere": Positions(
        PACKED.position_BL[:, 3:7],
        PACKED.document_BL[:, 3:7],
        LATER,
        ORDER,
        PACKED.document_BL.gather(1, ORDER.expand(2, -1)),
    ),
}
"""Two rows, or one that stands for all, of up to 12 tokens."""


def may_look(positions: Positions, window: int | None, row: int, query: int, key: int) -> bool:
    """Whether a key stands at or before the query, in its document, and among the last `window`."""

    def at(tensor: Tensor | None, place: int) -> int | None:
        return None if tensor is None else int(tensor[row if len(tensor) > 1 else 0, place])

    own_keys = positions.key_index_BM is not None
    query_index = query if positions.index_BL is None else at(positions.index_BL, query)
    if own_keys:
        key_index = at(positions.key_index_BM, key)
    else:
        key_index = key if positions.index_BL is None else at(positions.index_BL, key)
    key_document = at(positions.key_document_BM if own_keys else positions.document_BL, key)
    behind = query_index - key_index
    return behind >= 0 and (window is None or behind < window) and at(positions.document_BL, query) == key_document


def seen_by(positions: Positions, window: int | None, n_rows: int, n_queries: int, n_keys: int) -> Tensor:
    """`may_look` as a table (rows, 1, queries, keys)."""
    grid = [
        [[may_look(positions, window, row, query, key) for key in range(n_keys)] for query in range(n_queries)]
        for row in range(n_rows)
    ]
    return torch.tensor(grid)[:, None]


def looped(
    q_BNLH: Tensor,
    k_BKMH: Tensor,
    v_BKMH: Tensor,
    positions: Positions,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """A softmax over the keys that a query may look at, and a sink that takes its share and gives nothing."""
    n_rows, n_heads, n_queries, _ = q_BNLH.shape
    group_size = n_heads // k_BKMH.shape[1]
    out = []
    for row in range(n_rows):
        for head in range(n_heads):
            keys_MH, values_MH = k_BKMH[row, head // group_size], v_BKMH[row, head // group_size]
            for query in range(n_queries):
                seen = [key for key in range(len(keys_MH)) if may_look(positions, window, row, query, key)]
                logits = [scale * (q_BNLH[row, head, query] * keys_MH[key]).sum() for key in seen]
                if sinks_N is not None:
                    logits.append(sinks_N[head])
                weights = torch.stack(logits).exp()
                weights = weights / weights.sum()
                out.append(sum(weight * values_MH[key] for weight, key in zip(weights, seen, strict=False)))
    return torch.stack(out).view(n_rows, n_heads, n_queries, -1)


def sides(
    positions: Positions,
    *,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    width: int = 6,
    v_width: int = 6,
    dtype=torch.float64,
) -> list[Tensor]:
    """Queries, keys, values and sinks that fit `positions`."""
    _, n_queries, n_keys = positions.grid
    keys = 2, n_kv_heads, n_keys
    shapes = (2, n_heads, n_queries, width), (*keys, width), (*keys, v_width), (n_heads,)
    return [numbers(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def with_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The result of a function, and the gradients of its arguments under random weights of the result."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    (out * numbers(*out.shape, seed=9, dtype=out.dtype).to(out.device)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def seen_in_tiles(start_BL: Tensor, length: int, window: int | None) -> Tensor:
    """(B, L, L): what the tiles of rows let their queries see; every query stands in one tile."""
    seen_BLL = torch.zeros(len(start_BL), length, length, dtype=torch.bool)
    times_BL = torch.zeros(len(start_BL), length, dtype=torch.int64)
    for rows, (start, end, first, hidden) in rows_of(start_BL, len(start_BL), length, window):
        times_BL[rows, start:end] += 1
        ahead = torch.zeros(end - start, end - first).masked_fill_(
            torch.ones(end - start, end - first).triu(1).bool(), -1
        )
        assert hidden is not None or start == first, "the causal flag counts from the first key"
        seen_BLL[rows, start:end, first:end] = (ahead if hidden is None else hidden) == 0
    assert (times_BL == 1).all()
    return seen_BLL
