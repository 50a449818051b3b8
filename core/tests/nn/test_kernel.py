"""One rule of visibility, and the kernels that follow it, against loops over rows, heads, queries and keys."""

import pytest
import torch
from attention_by_loops import (
    CAUSAL,
    PACKED,
    WHERES,
    documents,
    looped,
    numbers,
    seen_by,
    seen_in_tiles,
    sides,
    with_gradients,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import core.nn.flex
import core.nn.sdpa
from core.config.errors import UserError
from core.nn.attention import Attention
from core.nn.backends import kernel_class
from core.nn.flex import Flex
from core.nn.kernel import KeyValues, MaskMod, Positions, visible
from core.nn.kernel_checks import check_kernels
from core.nn.sdpa import SDPA, with_sinks
from core.nn.start import Scale
from core.runtime.device import n_gpus
from core.testing.activation_checkpoint import Dispatched

CPU = torch.device("cpu")
WINDOWS = [None, 1, 3, 12, 100]
eager_flex = pytest.mark.filterwarnings(  # compiling takes half a minute, and only speed is lost without it
    "ignore:flex_attention called without torch.compile:UserWarning"
)
every_where = pytest.mark.parametrize("positions", WHERES.values(), ids=WHERES.keys())


# ------------------------------------------------------------------------------------------------------ who sees whom


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("v_width", [4, 6, 8])
def test_the_last_token_of_rows_in_inference(padded: bool, window: int | None, sinks: bool, v_width: int) -> None:
    """One query of a row, and the keys before it; of those that a window leaves behind nothing is read."""
    n_keys, pads = 12, torch.tensor([[1] * 10 + [0] * 2, [0] * 12])
    documents = (pads[:, -1:], pads) if padded else (None, None)
    last, index = torch.tensor([[n_keys - 1]]), torch.arange(n_keys)[None]
    positions = Positions(last, documents[0], last, index, documents[1], at_end=True)
    q, k, v = (numbers(2, n, length, width) for n, length, width in ((4, 1, 6), (2, n_keys, 6), (2, n_keys, v_width)))
    sinks_N = numbers(4, seed=3) if sinks else None
    expected = looped(q, k, v, positions, scale=0.4, window=window, sinks_N=sinks_N)
    if window is not None:
        k[:, :, :-window], v[:, :, :-window] = torch.nan, torch.nan
    kernel = SDPA(window)
    with torch.inference_mode():
        found = kernel(q, k, v, kernel.mask(positions), scale=0.4, sinks_N=sinks_N)
    torch.testing.assert_close(found.clone(), expected)


def test_rows_start_at_position_0() -> None:
    positions = Positions.rows(torch.zeros(3, 5, dtype=torch.long))
    assert positions.position_BL.tolist() == [[0, 1, 2, 3, 4]] and positions.tensors[1:] == (None,) * 5
    assert positions.is_plain and positions.grid == (1, 5, 5)


@pytest.mark.parametrize(
    ("name", "grid"),
    {
        "documents": (2, 12, 12),
        "rows alike": (1, 12, 12),
        "another order": (1, 12, 12),
        "another order of documents": (2, 12, 12),
        "earlier keys": (1, 3, 12),
        "keys of documents from elsewhere": (2, 4, 12),
    }.items(),
)
def test_grid_counts_rows_queries_and_keys(name: str, grid: tuple[int, int, int]) -> None:
    assert WHERES[name].grid == grid and not WHERES[name].is_plain


def test_positions_that_differ_make_no_rows_differ() -> None:
    """Positions turn queries and keys, they hide none: rows of single documents need one mask."""
    positions = Positions(torch.tensor([[0, 1, 2], [5, 6, 7]]))
    assert positions.grid == (1, 3, 3) and SDPA().mask(positions) is None


@every_where
@pytest.mark.parametrize("window", WINDOWS)
def test_masks_are_the_rule(positions: Positions, window: int | None) -> None:
    n_rows, n_queries, n_keys = positions.grid
    seen = seen_by(positions, window, n_rows, n_queries, n_keys)
    found = create_mask(visible(positions, window), n_rows, None, n_queries, n_keys, device="cpu")
    assert torch.equal(found, seen)
    mask = SDPA(window).mask(positions)
    if mask is None:
        assert torch.equal(seen[0, 0], torch.ones(12, 12).tril().bool())
    elif mask.dtype == torch.int64:  # where documents start, for tiles
        assert torch.equal(seen_in_tiles(mask, 12, window), seen[:, 0])
    else:
        assert torch.equal(mask, seen)


def test_no_mask_is_built_where_the_causal_flag_says_it_all() -> None:
    assert SDPA().mask(CAUSAL) is None and SDPA(12).mask(CAUSAL) is None and SDPA(100).mask(CAUSAL) is None
    assert SDPA(11).mask(CAUSAL) is not None and SDPA().mask(PACKED) is not None


@pytest.mark.parametrize(
    "positions",
    [
        PACKED._replace(key_index_BM=torch.arange(12)[None]),
        CAUSAL._replace(key_index_BM=torch.arange(12)[None], key_document_BM=PACKED.document_BL),
        PACKED._replace(key_document_BM=PACKED.document_BL),
    ],
    ids=["keys without documents", "queries without documents", "keys without places"],
)
def test_half_a_statement_about_keys_is_caught(positions: Positions) -> None:
    with pytest.raises(AssertionError, match="key_document goes with key_index and document"):
        visible(positions)


def test_keys_that_are_not_the_tokens_need_a_mask() -> None:
    q, k, v, _ = sides(WHERES["earlier keys"])
    with pytest.raises(AssertionError, match="no mask, and the keys are not the tokens"):
        SDPA()(q, k, v, None, scale=1.0)


# ------------------------------------------------------------------------------------------------------------ SDPA


@every_where
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sink", [False, True], ids=["plain", "sinks"])
def test_sdpa_equals_loops(positions: Positions, window: int | None, with_sink: bool) -> None:
    kernel, leaves = SDPA(window), sides(positions)[: 4 if with_sink else 3]

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return kernel(q, k, v, kernel.mask(positions), scale=0.3, sinks_N=sinks)

    def expected(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return looped(q, k, v, positions, scale=0.3, window=window, sinks_N=sinks)

    found = with_gradients(ours, leaves)
    torch.testing.assert_close(found, with_gradients(expected, leaves), rtol=0, atol=1e-12)
    assert all(tensor.any() for tensor in found)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("v_width", [2, 6, 10], ids=["narrow", "equal", "wide"])
@pytest.mark.parametrize("with_sink", [False, True], ids=["plain", "sinks"])
def test_sdpa_shares_keys_and_takes_values_of_any_width(n_kv_heads: int, v_width: int, with_sink: bool) -> None:
    leaves = sides(PACKED, n_kv_heads=n_kv_heads, v_width=v_width)[: 4 if with_sink else 3]
    mask = SDPA().mask(PACKED)

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return SDPA()(q, k, v, mask, scale=0.4, sinks_N=sinks)

    def by_loops(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return looped(q, k, v, PACKED, scale=0.4, sinks_N=sinks)

    found, expected = with_gradients(ours, leaves), with_gradients(by_loops, leaves)
    assert found[0].shape == (2, 4, 12, v_width)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sink", [-30.0, 0.0, 30.0])
def test_a_sink_takes_its_share(sink: float) -> None:
    """Over two keys of logit 0 it leaves 2 / (2 + e^sink) of their mean."""
    q, k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.tensor([1.0, 3.0])[:, None].expand(1, 1, 2, 4)
    out = SDPA()(q, k, v, None, scale=0.5, sinks_N=torch.tensor([sink]))
    expected = torch.tensor([1 / (1 + torch.tensor(sink).exp()), 4 / (2 + torch.tensor(sink).exp())])
    torch.testing.assert_close(out[0, 0], expected[:, None].expand(2, 4), rtol=1e-5, atol=1e-6)


def test_a_sink_is_one_key_more() -> None:
    q, k, v, sinks = sides(CAUSAL)
    q, k, v, mask = with_sinks(q, k, v, None, sinks)
    assert q.shape == (2, 4, 12, 14) and k.shape == (2, 2, 13, 14) and v.shape == (2, 2, 13, 14)
    products = q @ k.repeat_interleave(2, dim=1).mT
    torch.testing.assert_close(products[..., -1], sinks[:, None].expand(2, 4, 12))
    assert mask.shape == (1, 1, 12, 13) and mask[..., -1].all() and not v[:, :, -1].any()
    assert torch.equal(mask[0, 0, :, :12], torch.ones(12, 12).tril().bool())


@pytest.mark.parametrize("positions", [CAUSAL, PACKED], ids=["causal", "document"])
def test_bfloat16_stays_near(positions: Positions) -> None:
    leaves = sides(positions, width=16, v_width=8)
    mask = SDPA(5).mask(positions)
    half = [leaf.to(torch.bfloat16) for leaf in leaves[:3]]
    found = with_gradients(lambda q, k, v, s: SDPA(5)(q, k, v, mask, scale=0.25, sinks_N=s), [*half, leaves[3].float()])
    expected = with_gradients(lambda q, k, v, s: looped(q, k, v, positions, scale=0.25, window=5, sinks_N=s), leaves)
    assert found[0].dtype == torch.bfloat16 and found[4].dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 0.02, f"off by {error:.1%}"


@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("case", ["causal", "mask", "window", "sinks", "narrow values", "all"])
def test_the_fused_kernel_runs(case: str, n_kv_heads: int) -> None:
    """The plain path would keep a table of queries by keys for backward."""
    positions = PACKED if case in ("mask", "all") else CAUSAL
    v_width = 4 if case in ("narrow values", "all") else 6
    q, k, v, sinks = sides(positions, n_kv_heads=n_kv_heads, v_width=v_width, dtype=torch.float32)
    kernel = SDPA(5 if case in ("window", "all") else None)
    leaves = [leaf.requires_grad_() for leaf in (q, k, v, sinks)]
    with Dispatched() as dispatched:
        kernel(*leaves[:3], kernel.mask(positions), scale=1.0, sinks_N=leaves[3] if case in ("sinks", "all") else None)
    names = {str(op) for op, _ in dispatched.calls}
    assert names & {"aten._scaled_dot_product_flash_attention_for_cpu.default", "armature.tiled_attention.default"}
    assert not names & {"aten._safe_softmax.default", "aten._softmax.default"}


# ------------------------------------------------------------------------------------------------------------ Flex


@eager_flex
@every_where
@pytest.mark.parametrize(("window", "with_sink"), [(None, False), (3, True)], ids=["plain", "window and sinks"])
@torch.no_grad()
def test_flex_equals_loops(positions: Positions, window: int | None, with_sink: bool) -> None:
    q, k, v, sinks = sides(positions, width=8, v_width=4, dtype=torch.float32)
    kernel, sinks_N = Flex(window), sinks if with_sink else None
    out = kernel(q, k, v, kernel.mask(positions), scale=0.3, sinks_N=sinks_N)
    expected = looped(*(t.double() for t in (q, k, v)), positions, scale=0.3, window=window, sinks_N=sinks_N)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 200, 500])
@pytest.mark.parametrize("lengths", [[640], [600], [128, 256, 216], [40, 1, 300, 87, 212], [5]], ids=str)
def test_blocks_of_flex_are_those_of_the_table(lengths: list[int], window: int | None) -> None:
    """Which blocks are computed, and which without a mask: found by arithmetic, and by PyTorch from all pairs."""
    rows = torch.tensor([documents(*lengths), documents(*reversed(lengths))])
    positions = Positions(torch.zeros_like(rows), rows if len(lengths) > 1 else None)
    n_rows, length, _ = positions.grid
    found = Flex(window).mask(positions)
    expected = create_block_mask(visible(positions, window), n_rows, None, length, length, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for kind in ("kv", "full_kv", "q", "full_q"):
        ours, theirs = getattr(found, f"{kind}_indices"), getattr(expected, f"{kind}_indices")
        for place, n in enumerate(getattr(expected, f"{kind}_num_blocks").flatten().tolist()):
            assert torch.equal(ours.flatten(0, -2)[place, :n], theirs.flatten(0, -2)[place, :n]), kind
    assert found.shape == expected.shape and found.BLOCK_SIZE == expected.BLOCK_SIZE


@eager_flex
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_flex_shares_keys(n_kv_heads: int) -> None:
    q, k, v, sinks = sides(PACKED, n_kv_heads=n_kv_heads, width=8, v_width=8, dtype=torch.float32)
    out, expected = (kernel(q, k, v, kernel.mask(PACKED), scale=0.3, sinks_N=sinks) for kernel in (Flex(), SDPA()))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@eager_flex
@torch.no_grad()
def test_both_kernels_consume_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rule in the one place changes both alike: here every third token is hidden. (Tiles have documents and
    windows alone; `test_tiles_are_the_rule` compares them with it.)"""

    def gaps(positions: Positions, window: int | None = None) -> MaskMod:
        return lambda row, head, query, key: (key <= query) & ((key % 3 != 1) | (key == query))

    ORDERED = WHERES["another order of documents"]
    q, k, v, _ = sides(ORDERED, width=8, v_width=8, dtype=torch.float32)
    sdpa, flex = SDPA(), Flex()
    before = sdpa(q, k, v, sdpa.mask(ORDERED), scale=1.0)
    for place in (core.nn.sdpa, core.nn.flex):
        monkeypatch.setattr(place, "visible", gaps)
    after = sdpa(q, k, v, sdpa.mask(ORDERED), scale=1.0)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(flex(q, k, v, flex.mask(ORDERED), scale=1.0), after, rtol=0, atol=1e-5)


def test_flex_cannot_train_on_a_cpu() -> None:
    flex, sdpa = (Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, backend=name) for name in ("flex", "sdpa"))
    flex, sdpa = (each.build(dim=8, norm_eps=1e-6, scale=Scale(0.02, 0.01)) for each in (flex, sdpa))
    with pytest.raises(UserError, match='attention.backend "flex": it cannot train on a cpu: use .*backend sdpa'):
        check_kernels([sdpa, flex], device=CPU, trains=True)
    check_kernels([sdpa, flex], device=torch.device("cuda"), trains=True)
    check_kernels([flex], device=CPU, cached=True)
    check_kernels([sdpa], device=CPU, trains=True)


@pytest.mark.gpu
@pytest.mark.skipif(not n_gpus(), reason="flex_attention has a backward on GPUs only")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sink", [False, True], ids=["plain", "sinks"])
def test_flex_trains_like_sdpa(window: int | None, with_sink: bool) -> None:
    positions = Positions(*(None if t is None else t.cuda() for t in PACKED.tensors))
    leaves = [
        leaf.cuda() for leaf in sides(positions, width=16, v_width=16, dtype=torch.float32)[: 4 if with_sink else 3]
    ]
    found = [
        with_gradients(
            lambda q, k, v, *s, kernel=kernel: kernel(
                q, k, v, kernel.mask(positions), scale=0.25, sinks_N=s[0] if s else None
            ),
            leaves,
        )
        for kernel in (Flex(window), SDPA(window))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=2e-2)


# ------------------------------------------------------------------------------------------------- what both share


def test_equal_kernels_are_one_key() -> None:
    kernels = [SDPA(), SDPA(None), SDPA(4), SDPA(4), Flex(), Flex(4), Flex(4)]
    assert len(set(kernels)) == 4 and SDPA(4) == SDPA(4) and SDPA(4) != SDPA(5) and SDPA() != Flex()
    assert kernel_class("sdpa") is SDPA and kernel_class("flex") is Flex


def test_keys_are_what_is_given_until_someone_hooks_them() -> None:
    keys, k, v = KeyValues(), numbers(1, 2, 3), numbers(1, 2, 4)
    found = keys(k, v)
    assert found[0] is k and found[1] is v and not list(keys.parameters())
    keys.register_forward_hook(lambda module, given, out: tuple(torch.cat((side, side), 1) for side in out))
    assert [side.shape for side in keys(k, v)] == [(1, 4, 3), (1, 4, 4)]


def test_documents_are_told_apart_by_number_alone() -> None:
    """Numbers need not grow: a text behind pads may have the lower one."""
    positions = Positions(torch.arange(5)[None], torch.tensor([[7, 7, 2, 2, 2]]))
    same = Positions(torch.arange(5)[None], torch.tensor([documents(2, 3)]))
    assert torch.equal(SDPA().mask(positions), SDPA().mask(same))
