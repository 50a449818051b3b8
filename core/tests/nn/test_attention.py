"""Attention against loops over rows, heads, queries and keys; and one rule of visibility behind both kernels."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import core.nn.attention
from core.config.errors import UserError
from core.config.validate import validate
from core.nn.attention import SDPA, Attention, Flex, MaskMod, Where, visible
from core.nn.init import Scale
from core.nn.module import Flops
from core.nn.rope import RoPE

CPU = torch.device("cpu")
eager_flex = pytest.mark.filterwarnings(  # compiling takes half a minute, and only speed is lost without it
    "ignore:flex_attention called without torch.compile:UserWarning"
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positions(*lengths: int) -> list[int]:
    return [position for length in lengths for position in range(length)]


def documents(*lengths: int) -> list[int]:
    return [number for number, length in enumerate(lengths) for _ in range(length)]


CAUSAL = Where(torch.arange(12)[None])
PACKED = Where(
    torch.tensor([positions(3, 1, 8), positions(7, 5)]),
    torch.tensor([documents(3, 1, 8), documents(7, 5)]),
)


def looped(q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, where: Where) -> Tensor:
    """Attention by the definition: a softmax over the keys up to the query that stand in its document."""
    n_rows, n_heads, length, width = q_BNLH.shape
    out = torch.zeros_like(q_BNLH)
    for row in range(n_rows):
        for head in range(n_heads):
            group = head // (n_heads // k_BKLH.shape[1])
            for query in range(length):
                keys = [
                    key
                    for key in range(query + 1)
                    if where.document_BL is None or where.document_BL[row, key] == where.document_BL[row, query]
                ]
                scores = [float(q_BNLH[row, head, query] @ k_BKLH[row, group, key]) / math.sqrt(width) for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                for key, weight in zip(keys, weights, strict=True):
                    out[row, head, query] += weight / sum(weights) * v_BKLH[row, group, key]
    return out


@pytest.mark.parametrize("where", [CAUSAL, PACKED], ids=["causal", "document"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_sdpa_equals_loops(where: Where, n_kv_heads: int) -> None:
    q, k, v = randn(2, 4, 12, 6), randn(2, n_kv_heads, 12, 6, seed=1), randn(2, n_kv_heads, 12, 6, seed=2)
    kernel = SDPA()
    torch.testing.assert_close(kernel(q, k, v, kernel.mask(where)), looped(q, k, v, where), rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", [CAUSAL, PACKED], ids=["causal", "document"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_layer_equals_loops(where: Where, qk_norm: bool) -> None:
    """Project, normalise heads, turn, attend, project back, in this order."""
    config = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm=qk_norm)
    layer = config.build(dim=10, norm_eps=1e-5, scale=Scale(1.0, 1.0))
    for number, weight in enumerate(layer.parameters()):
        torch.nn.init.uniform_(weight, 0.2, 1.0, generator=torch.Generator().manual_seed(number))
    x_BLD = randn(2, 12, 10, dtype=torch.float32)
    rotation = RoPE.Config(theta=100.0).build(head_dim=6)(where.position_BL)

    def heads(weight: Tensor, norm: Tensor | None) -> Tensor:
        y_BLNH = (x_BLD @ weight.T).reshape(2, 12, -1, 6)
        if norm is not None:
            y_BLNH = y_BLNH / (y_BLNH.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
        return y_BLNH

    q_norm, k_norm = (layer.q_norm.weight, layer.k_norm.weight) if qk_norm else (None, None)
    q, k = rotation(heads(layer.wq.weight, q_norm)), rotation(heads(layer.wk.weight, k_norm))
    v = heads(layer.wv.weight, None)
    o_BNLH = looped(*(t.transpose(1, 2).double().detach() for t in (q, k, v)), where)
    expected = o_BNLH.transpose(1, 2).reshape(2, 12, 24) @ layer.wo.weight.T.double()
    out = layer(x_BLD, rotation, SDPA().mask(where))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_sdpa_builds_no_mask_for_whole_rows() -> None:
    assert SDPA().mask(CAUSAL) is None


def test_rows_start_at_position_0() -> None:
    where = Where.rows(torch.zeros(3, 5, dtype=torch.long))
    assert where.position_BL.tolist() == [[0, 1, 2, 3, 4]] and where.document_BL is None


@pytest.mark.parametrize("where", [CAUSAL, PACKED], ids=["causal", "document"])
def test_visible_is_causal_and_within_the_document(where: Where) -> None:
    seen = create_mask(visible(where), 2, None, 12, 12, device="cpu")
    for row in range(2):
        for query in range(12):
            for key in range(12):
                together = where.document_BL is None or where.document_BL[row, query] == where.document_BL[row, key]
                assert seen[row, 0, query, key] == (key <= query and bool(together))


def test_sdpa_mask_is_the_rule() -> None:
    assert torch.equal(SDPA().mask(PACKED), create_mask(visible(PACKED), 2, None, 12, 12, device="cpu"))


@eager_flex
@pytest.mark.parametrize("where", [CAUSAL, PACKED], ids=["causal", "document"])
@pytest.mark.parametrize("n_kv_heads", [1, 4])
@torch.no_grad()
def test_flex_equals_sdpa(where: Where, n_kv_heads: int) -> None:
    q, k, v = (randn(2, n, 12, 8, seed=n, dtype=torch.float32) for n in (4, n_kv_heads, n_kv_heads))
    flex, sdpa = Flex(), SDPA()
    out = flex(q, k, v, flex.mask(where))
    torch.testing.assert_close(out, sdpa(q, k, v, sdpa.mask(where)), rtol=0, atol=1e-5)


@eager_flex
@torch.no_grad()
def test_both_kernels_consume_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rule in the one place changes both alike: here a window of three tokens."""

    def window(where: Where) -> MaskMod:
        return lambda row, head, query, key: (key <= query) & (query - key < 3)

    q, k, v = (randn(2, 2, 12, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    sdpa, flex = SDPA(), Flex()
    before = sdpa(q, k, v, sdpa.mask(PACKED))
    monkeypatch.setattr(core.nn.attention, "visible", window)
    after = sdpa(q, k, v, sdpa.mask(PACKED))
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(flex(q, k, v, flex.mask(PACKED)), after, rtol=0, atol=1e-5)


def test_flex_cannot_train_on_a_cpu() -> None:
    with pytest.raises(UserError, match='attention.backend "flex" cannot train on a cpu.*backend sdpa'):
        Flex().check_trains_on(CPU)
    Flex().check_trains_on(torch.device("cuda"))
    SDPA().check_trains_on(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has a backward on GPUs only")
def test_flex_trains_like_sdpa() -> None:
    where = Where(*(t.cuda() for t in PACKED))
    gradients = []
    for kernel in (SDPA(), Flex()):
        q, k, v = (randn(2, n, 12, 16, seed=n, dtype=torch.float32).cuda().requires_grad_() for n in (4, 2, 2))
        kernel(q, k, v, kernel.mask(where)).square().sum().backward()
        gradients.append([q.grad, k.grad, v.grad])
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-2)


class Recorder(SDPA):
    """Remembers the dtypes that reach the kernel."""

    def __call__(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask: Any) -> Tensor:
        self.dtypes = {q_BNLH.dtype, k_BKLH.dtype, v_BKLH.dtype}
        return super().__call__(q_BNLH, k_BKLH, v_BKLH, mask)


def test_one_dtype_reaches_the_kernel_under_autocast() -> None:
    """Norm weights and angles are fp32: they must not lift queries and keys above values, which flex refuses."""
    config = Attention.Config(n_heads=2, n_kv_heads=1, head_dim=8, qk_norm=True)
    layer = config.build(dim=16, norm_eps=1e-6, scale=Scale(0.1, 0.1))
    for weight in layer.parameters():
        torch.nn.init.uniform_(weight)
    layer.kernel = Recorder()
    rotation = RoPE.Config().build(head_dim=8)(CAUSAL.position_BL)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        layer(randn(1, 12, 16, dtype=torch.float32), rotation, None)
    assert layer.kernel.dtypes == {torch.bfloat16}


def test_config_chooses_the_kernel() -> None:
    for backend, kernel in (("sdpa", SDPA), ("flex", Flex)):
        config = Attention.Config(n_heads=2, n_kv_heads=1, head_dim=8, backend=backend)
        assert isinstance(config.build(dim=4, norm_eps=1e-6, scale=Scale(0.1, 0.1)).kernel, kernel)


def test_flops_compare_each_query_with_every_key() -> None:
    layer = Attention.Config(n_heads=3, n_kv_heads=1, head_dim=8).build(dim=4, norm_eps=1e-6, scale=Scale(0.1, 0.1))
    assert layer.flops_per_token(100) == Flops(attention=2 * (2 * 3 * 8 * 100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 0}, "n_heads: n_heads 0 must be at least 1"),
        ({"n_heads": -4}, "n_heads: n_heads -4 must be at least 1"),
        ({"n_kv_heads": 3}, "n_kv_heads: n_kv_heads 3 must divide n_heads 4: use 1, 2, 4"),
        ({"n_kv_heads": 0}, "n_kv_heads: n_kv_heads 0 must divide n_heads 4: use 1, 2, 4"),
        ({"head_dim": 7}, "head_dim: head_dim 7 must be even"),
        ({"head_dim": 0}, "head_dim: head_dim 0 must be even"),
        ({"backend": "flash"}, "backend: expected 'sdpa' or 'flex', got 'flash'"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Attention.Config(**{"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, **change}))
