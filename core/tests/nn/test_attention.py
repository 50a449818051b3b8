"""The attention layer against loops: project, normalise heads, turn, attend, project back."""

import warnings
from typing import Any

import pytest
import torch
from attention_by_loops import CAUSAL, PACKED, looped, numbers
from torch import Tensor
from torch.nn import functional as F

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.attention import Attention
from core.nn.flex import Flex
from core.nn.kernel import Positions
from core.nn.module import Flops
from core.nn.rope import RoPE
from core.nn.sdpa import SDPA
from core.nn.start import Constant, Normal, Scale
from core.nn.weights import parameter_count, training_flops_per_token, weights

ROPE = RoPE.Config(theta=100.0)


def build(**changes: Any) -> Attention:
    """A layer of width 10 with two key/value heads, all weights drawn so wide that each matters."""
    config = Attention.Config(**{"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, **changes})
    layer = config.build(dim=10, norm_eps=1e-5, scale=Scale(1.0, 1.0))
    for number, weight in enumerate(layer.parameters()):
        torch.nn.init.uniform_(weight, -1.0, 1.0, generator=torch.Generator().manual_seed(number))
    return layer


def by_loops(layer: Attention, x_BLD: Tensor, positions: Positions, w: dict[str, Tensor], window: int | None) -> Tensor:
    """The layer in double precision from its weights `w`; heads lie side by side in the rows of a projection."""
    pair_of = torch.tensor([100.0 ** (-2 * i / 6) for i in range(3)], dtype=torch.float64)
    turn_BL3 = torch.polar(torch.ones(()).double(), positions.position_BL[..., None] * pair_of)

    def heads(name: str, norm: str | None, turned: bool) -> Tensor:
        y_BLNH = F.linear(x_BLD, w[f"{name}.weight"], w.get(f"{name}.bias")).unflatten(-1, (-1, 6))
        if norm in w:
            y_BLNH = y_BLNH / (y_BLNH.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[norm]
        if turned:  # pairs (i, i + 3) as complex numbers
            z_BLN3 = torch.complex(y_BLNH[..., :3], y_BLNH[..., 3:]) * turn_BL3[:, :, None]
            y_BLNH = torch.cat((z_BLN3.real, z_BLN3.imag), -1)
        return y_BLNH.transpose(1, 2)

    q, k = heads("wq", "q_norm.weight", True), heads("wk", "k_norm.weight", True)
    o = looped(q, k, heads("wv", None, False), positions, scale=6**-0.5, window=window, sinks_N=w.get("sinks"))
    return F.linear(o.transpose(1, 2).flatten(-2), w["wo.weight"], w.get("wo.bias"))


@pytest.mark.parametrize("positions", [CAUSAL, PACKED], ids=["causal", "document"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": True}, {"bias": True}, {"sinks": True}, {"window": 3}]
    + [{"bias": True, "sinks": True, "window": 5, "qk_norm": True, "n_kv_heads": 1}],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_layer_and_its_gradients_equal_loops(positions: Positions, changes: dict[str, Any]) -> None:
    layer, x_BLD, grad_BLD = build(**changes), numbers(2, 12, 10), numbers(2, 12, 10, seed=1)
    doubles = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    expected = by_loops(layer, x_BLD, positions, doubles, changes.get("window"))
    (expected * grad_BLD).sum().backward()
    out = layer(x_BLD.float(), ROPE.build(head_dim=6)(positions.position_BL), layer.kernel.mask(positions))
    (out * grad_BLD.float()).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    for name, weight in layer.named_parameters():
        assert weight.grad is not None and doubles[name].grad is not None
        assert weight.grad.any(), f"{name}: the gradient is zero"
        error = (weight.grad.double() - doubles[name].grad).norm() / doubles[name].grad.norm()
        assert error < 1e-4, f"{name}: the gradient is off by {error:.1e}"


def test_weights_have_the_shapes_axes_and_starts_of_the_settings() -> None:
    config = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm=True, bias=True, sinks=True)
    layer = config.build(dim=10, norm_eps=1e-5, scale=Scale(0.3, 0.1))
    found = {name: (tuple(value.shape), axes, start) for name, value, axes, start in weights(layer)}
    wide, narrow = Normal(0.3), Normal(0.1)
    assert found == {
        "sinks": ((4,), ("heads",), wide),
        "wq.weight": ((24, 10), ("heads", "embed"), wide),
        "wq.bias": ((24,), ("heads",), Constant(0.0)),
        "wk.weight": ((12, 10), ("heads", "embed"), wide),
        "wk.bias": ((12,), ("heads",), Constant(0.0)),
        "wv.weight": ((12, 10), ("heads", "embed"), wide),
        "wv.bias": ((12,), ("heads",), Constant(0.0)),
        "wo.weight": ((10, 24), ("embed", "heads"), narrow),
        "wo.bias": ((10,), ("embed",), Constant(0.0)),
        "q_norm.weight": ((6,), ("head",), Constant(1.0)),
        "k_norm.weight": ((6,), ("head",), Constant(1.0)),
    }


@torch.no_grad()
def test_keys_from_earlier_can_be_added_by_a_hook() -> None:
    """What a cache does: the last tokens, with the keys of the first ones kept, answer as in the whole row."""
    layer, x_BLD = build(qk_norm=True, bias=True, sinks=True, window=7), numbers(2, 12, 10, dtype=torch.float32)
    rope = ROPE.build(head_dim=6)
    whole = layer(x_BLD, rope(CAUSAL.position_BL), layer.kernel.mask(CAUSAL))
    seen: list[tuple[Tensor, ...]] = []
    handle = layer.keys.register_forward_hook(lambda module, given, out: seen.append(out))
    first = Positions(torch.arange(9)[None])
    layer(x_BLD[:, :9], rope(first.position_BL), layer.kernel.mask(first))
    handle.remove()
    assert [side.shape for side in seen[0]] == [(2, 9, 2, 6), (2, 9, 2, 6)]
    layer.keys.register_forward_hook(
        lambda module, given, out: tuple(torch.cat(pair, dim=1) for pair in zip(seen[0], out, strict=True))
    )
    last_L = torch.arange(9, 12)[None]
    last = Positions(last_L, None, last_L, torch.arange(12)[None])
    out = layer(x_BLD[:, 9:], rope(last_L), layer.kernel.mask(last))
    torch.testing.assert_close(out, whole[:, 9:], rtol=0, atol=1e-5)


class Recorder(SDPA):
    """Remembers the dtypes that reach the kernel."""

    def __call__(self, q_BNLH: Tensor, k_BKMH: Tensor, v_BKMH: Tensor, *rest: Any, **settings: Any) -> Tensor:
        self.dtypes = {q_BNLH.dtype, k_BKMH.dtype, v_BKMH.dtype}
        return super().__call__(q_BNLH, k_BKMH, v_BKMH, *rest, **settings)


def test_one_dtype_reaches_the_kernel_under_autocast() -> None:
    """Norm weights and angles are fp32: they must not lift queries and keys above values, which flex refuses."""
    layer = build(qk_norm=True, bias=True, sinks=True)
    layer.kernel = Recorder()
    rotation = ROPE.build(head_dim=6)(CAUSAL.position_BL)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        out = layer(numbers(1, 12, 10, dtype=torch.float32), rotation, None)
    assert layer.kernel.dtypes == {torch.bfloat16} and out.dtype == torch.bfloat16


def test_config_chooses_the_kernel() -> None:
    for backend, kernel in (("sdpa", SDPA), ("flex", Flex)):
        assert build(backend=backend).kernel == kernel(None)
        assert build(backend=backend, window=7).kernel == kernel(7)


@pytest.mark.parametrize("changes", [{}, {"window": 5, "sinks": True, "bias": True}], ids=["plain", "window"])
def test_flops_compare_each_query_with_every_key(changes: dict[str, Any]) -> None:
    layer = build(n_heads=3, n_kv_heads=1, head_dim=8, **changes)
    assert layer.flops_per_token(100) == Flops(attention=2 * (2 * 3 * 8 * 100))
    products = 2 * 10 * (24 + 8 + 8 + 24)
    assert training_flops_per_token(layer, 100) == Flops(3 * products, 3 * 2 * (2 * 3 * 8 * 100))


def test_parameters_by_hand() -> None:
    assert parameter_count(build()) == 10 * (24 + 12 + 12 + 24)
    assert parameter_count(build(bias=True, sinks=True)) == 10 * (24 + 12 + 12 + 24) + (24 + 12 + 12 + 10) + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 0}, "n_heads: n_heads 0 must be at least 1"),
        ({"n_heads": -4}, "n_heads: n_heads -4 must be at least 1"),
        ({"n_kv_heads": 3}, "n_kv_heads: n_kv_heads 3 must divide n_heads 4: use 1, 2, 4"),
        ({"n_kv_heads": 0}, "n_kv_heads: n_kv_heads 0 must divide n_heads 4: use 1, 2, 4"),
        ({"head_dim": 7}, "head_dim: head_dim 7 must be even"),
        ({"head_dim": 0}, "head_dim: head_dim 0 must be at least 1"),
        ({"window": 0}, "window: window 0 must be at least 1, or None"),
        ({"window": -1}, "window: window -1 must be at least 1, or None"),
        (
            {"backend": "flexx"},
            "backend: no attention kernel is called 'flexx'; did you mean flex\\? There is",
        ),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Attention.Config(**{"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, **change}))
