"""The kernel on PyTorch's varlen_attn: PyTorch's kernel for GPUs is replaced by loops over documents."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from attention_by_loops import CAUSAL, PACKED, WHERES, looped, sides, with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.activation_checkpoint.ops import saved_ops
from core.config.errors import UserError
from core.data.packing import Batch
from core.nn.attention import Attention
from core.nn.kernel import KernelUse, Positions
from core.nn.kernel_checks import check_kernels
from core.nn.start import Scale
from core.nn.tiling import spans
from core.nn.varlen import Varlen, ends
from core.parallel.layout import whole_rows
from core.testing.activation_checkpoint import Dispatched, checkpoint_blocks
from core.testing.toy import Toy, on_cpu, randomise, toy_attention

GPU = torch.device("cuda")
OP = torch.ops.torch_attn._varlen_attn.default
ROWS = {name: WHERES[name] for name in ("causal", "documents", "rows alike")}


class Document(NamedTuple):
    """Heads of one document, keys and values repeated for the query heads that share them, (N, L, H) each."""

    place: slice
    q: Tensor
    k: Tensor
    v: Tensor
    logits_NLL: Tensor


def documents_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, ends_S: Tensor, *, scale: float, window: int
) -> Iterator[Document]:
    n_each = q_TNH.shape[1] // k_TKH.shape[1]
    for start, end in zip(ends_S[:-1].tolist(), ends_S[1:].tolist(), strict=True):
        q, k, v = (side[start:end].transpose(0, 1) for side in (q_TNH, k_TKH, v_TKH))
        k, v = (side.repeat_interleave(n_each, 0) for side in (k, v))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= window) if window >= 0 else True)
        yield Document(slice(start, end), q, k, v, (scale * q @ k.mT).masked_fill(~seen, -torch.inf))


@pytest.fixture
def on_a_cpu() -> Iterator[list[str]]:
    """PyTorch's operation computes on a CPU, by loops; the calls of it."""
    calls: list[str] = []

    def forward(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, *_: Any, **rest: Any) -> tuple[Any, ...]:
        calls.append("forward")
        assert rest["window_size_right"] == 0 and dropout == 0 and longest_q >= int(ends_q.diff().max())
        assert torch.equal(ends_q, ends_k) and ends_q.dtype == torch.int32 and longest_q == longest_k
        o, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        for part in documents_of(q, k, v, ends_q, scale=rest["scale"], window=rest["window_size_left"]):
            o[part.place] = (part.logits_NLL.softmax(-1) @ part.v).transpose(0, 1)
            lse[:, part.place] = part.logits_NLL.logsumexp(-1).float()
        return o, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(())

    def backward(grad, q, k, v, o, lse, ends_q, *_: Any, scale: float, **rest: Any) -> tuple[Tensor, ...]:
        calls.append("backward")
        dq, dk, dv = (torch.empty_like(side) for side in (q, k, v))
        for part in documents_of(q, k, v, ends_q, scale=scale, window=rest["window_size_left"]):
            g, out = grad[part.place].transpose(0, 1), o[part.place].transpose(0, 1)
            weights = part.logits_NLL.softmax(-1)
            by_logits = weights * (g @ part.v.mT - (g * out).sum(-1, keepdim=True))
            dq[part.place] = (scale * by_logits @ part.k).transpose(0, 1)
            for whole, each in ((dk, scale * by_logits.mT @ part.q), (dv, weights.mT @ g)):
                whole[part.place] = each.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
        return dq, dk, dv

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("positions", ROWS.values(), ids=ROWS.keys())
def test_it_computes_attention(positions: Positions, window: int | None) -> None:
    kernel = Varlen(window)
    found = with_gradients(lambda q, k, v: kernel(q, k, v, kernel.mask(positions), scale=0.3), sides(positions)[:3])
    expected = with_gradients(
        lambda q, k, v: looped(q, k, v, positions, scale=0.3, window=window), sides(positions)[:3]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert all(tensor.any() for tensor in found)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("shares", [True, False], ids=["few keys", "repeated keys"])
@pytest.mark.parametrize(("n_kv_heads", "v_width"), [(1, 6), (4, 2), (2, 10)])
def test_it_shares_keys_and_takes_values_of_any_width(
    monkeypatch: pytest.MonkeyPatch, n_kv_heads: int, v_width: int, shares: bool
) -> None:
    """Keys are repeated where PyTorch's function has none that are shared, in 2.11."""
    if not shares:
        monkeypatch.setattr("core.nn.varlen.TAKES_FEW_KEYS", False)
    leaves = sides(PACKED, n_kv_heads=n_kv_heads, v_width=v_width)[:3]
    found = with_gradients(lambda q, k, v: Varlen()(q, k, v, Varlen().mask(PACKED), scale=0.4), leaves)
    torch.testing.assert_close(found, with_gradients(lambda q, k, v: looped(q, k, v, PACKED, scale=0.4), leaves))


def test_the_host_says_where_documents_are() -> None:
    """Rows of a batch bring it along; what has documents alone is asked."""
    empty_BL = torch.zeros_like(PACKED.document_BL)
    batch = Batch(empty_BL, empty_BL, PACKED.position_BL, PACKED.document_BL)
    told = whole_rows(batch, torch.device("cpu"), documents=True).positions
    assert told.spans is not None and told.spans[0].tolist() == [0, 3, 4, 12, 19] and told.spans[1:] == (8, 2)
    assert Varlen().mask(told) is told.spans
    assert Varlen().mask(PACKED)[0].tolist() == [0, 3, 4, 12, 19]
    assert whole_rows(batch, torch.device("cpu"), documents=False).positions.spans is None
    assert Varlen().mask(CAUSAL) is None


def test_where_documents_end() -> None:
    ends_S, longest = ends(spans(torch.tensor([[0] * 150 + [1] * 150])), 2, 300, torch.device("cpu"))
    assert ends_S.tolist() == [0, 150, 300, 450, 600] and longest == 256
    ends_S, longest = ends(None, 3, 300, torch.device("cpu"))
    assert ends_S.tolist() == [0, 300, 600, 900] and longest == 300 and ends_S.dtype == torch.int32


FITS = KernelUse(4, 2, 64, 64, device=GPU, dtype=torch.bfloat16, trains=True, documents=True)


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (FITS, None),
        (FITS._replace(device=torch.device("cpu")), "it runs on a gpu, not on a cpu"),
        (FITS._replace(sinks=True), "it has no sinks"),
        (FITS._replace(cached=True), "it wants whole rows in their order"),
        (FITS._replace(reordered=True), "it wants whole rows in their order"),
        (FITS._replace(dtype=torch.float32), "it computes in bfloat16, not in float32"),
        (FITS._replace(qk_dim=20, v_dim=16), "a head must have a multiple of 8 numbers, 256 at most, and has 20"),
        (FITS._replace(v_dim=512), "a head must have a multiple of 8 numbers, 256 at most, and has 512"),
    ],
)
def test_what_it_cannot_do(use: KernelUse, problem: str | None) -> None:
    assert Varlen().problem(use) == problem


def test_a_run_on_a_cpu_is_told_what_to_use() -> None:
    config = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, backend="varlen")
    attention = config.build(dim=8, norm_eps=1e-6, scale=Scale(0.02, 0.01))
    with pytest.raises(UserError, match='attention.backend "varlen": it runs on a gpu, not on a cpu: use .* sdpa'):
        check_kernels([attention], device=torch.device("cpu"), trains=True)


def test_selective_checkpointing_saves_it(on_a_cpu: list[str]) -> None:
    """Its output is on the list: backward repeats products of norms, and not the attention."""
    assert OP in saved_ops()
    model = on_cpu(Toy.Config(n_layers=2, attention=replace(toy_attention(), backend="varlen")))
    randomise(model, seed=0)
    tokens_BL = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = model(tokens_BL).square().mean()
    checkpoint_blocks(model, "selective")
    on_a_cpu.clear()
    with Dispatched() as dispatched:
        loss = model(tokens_BL).square().mean()
        loss.backward()
    assert on_a_cpu == ["forward"] * 2 + ["backward"] * 2 and loss == expected
    assert sum(op is OP for op, _ in dispatched.calls) == 2


@pytest.mark.usefixtures("on_a_cpu")
def test_it_is_compiled_in_one_graph_and_its_products_are_counted() -> None:
    q, k, v = (side.float() for side in sides(CAUSAL, width=8, v_width=8)[:3])
    kernel = Varlen(3)
    compiled = torch.compile(
        lambda q, k, v: kernel(q, k, v, kernel.mask(CAUSAL), scale=0.3), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), kernel(q, k, v, None, scale=0.3), rtol=0, atol=0)
    leaves = [side.requires_grad_() for side in (q, k, v)]
    with FlopCounterMode(display=False) as counted:
        o = kernel(*leaves, None, scale=0.3)
        o.backward(torch.ones_like(o))
    one_product = 2 * 2 * 4 * 12 * 12 * 8
    assert counted.get_total_flops() == (2 + 5) * one_product
