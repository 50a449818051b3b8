"""Attention in tiles against the one rule of visibility and against loops."""

import pytest
import torch
from attention_by_loops import PACKED, documents, looped, seen_by, seen_in_tiles, sides, with_gradients
from torch import Tensor

from core.nn import tiling
from core.nn.kernel import Positions
from core.nn.tiles import TILED_ATTENTION, Tiles
from core.nn.tiling import starts


@pytest.mark.parametrize("tile", [2, 5, 128])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 40])
def test_tiles_are_the_rule(monkeypatch: pytest.MonkeyPatch, tile: int, window: int | None) -> None:
    """Documents longer and shorter than a tile and than the window, in rows of their own."""
    monkeypatch.setattr(tiling, "TILE", tile)
    monkeypatch.setattr(tiling, "WORTH_CUTTING", range(tile + 1, 12))
    rows = [[1] * 30, [30], [5, 1, 1, 1, 9, 2, 2, 9], [2, 28], [11, 12, 7]]
    positions = Positions(torch.zeros(5, 30), torch.tensor([documents(*lengths) for lengths in rows]))
    assert torch.equal(seen_in_tiles(starts(positions), 30, window), seen_by(positions, window, 5, 30, 30)[:, 0])


@pytest.mark.parametrize("case", ["causal", "window", "documents", "all"])
def test_rows_of_many_tiles_equal_the_formula(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(tiling, "TILE", 4)
    monkeypatch.setattr(tiling, "WIDEST_TILE", 4)
    monkeypatch.setattr(tiling, "WORTH_CUTTING", range(5, 100))
    lengths = [12] if case in ("causal", "window") else [1, 2, 7, 2]
    positions = Positions(torch.zeros(2, 12), torch.tensor([documents(*lengths), documents(*reversed(lengths))]))
    window = 3 if case in ("window", "all") else None
    leaves = sides(positions)[: 4 if case == "all" else 3]

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return Tiles(window)(q, k, v, starts(positions), scale=0.3, sinks_N=sinks)

    def expected(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return looped(q, k, v, positions, scale=0.3, window=window, sinks_N=sinks)

    torch.testing.assert_close(with_gradients(ours, leaves), with_gradients(expected, leaves), rtol=0, atol=1e-12)


def test_the_operation_says_what_it_returns() -> None:
    """Its shapes, types and strides without numbers, and its place in autograd, as PyTorch checks them."""
    for dtype, with_sink in ((torch.float32, True), (torch.bfloat16, False)):
        q, k, v, sinks = (leaf.detach().to(dtype).requires_grad_() for leaf in sides(PACKED, width=8, v_width=8))
        args = (q, k, v, starts(PACKED), 3, sinks if with_sink else None, 0.3)
        torch.library.opcheck(
            TILED_ATTENTION, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


def test_a_compiler_may_take_lengths_that_vary() -> None:
    pays = torch.compile(lambda q: q + Tiles.pays(q, None, None), backend="eager", dynamic=True, fullgraph=True)
    for length, paid in ((12, 0.0), (200, 1.0), (1023, 1.0), (1024, 0.0)):
        assert pays(torch.zeros(1, 2, length, 4)).unique().tolist() == [paid]
