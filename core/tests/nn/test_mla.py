"""Multi-head latent attention against a plain loop over rows, heads, queries and keys in double precision."""

import cmath
from typing import Any

import pytest
import torch
from attention_by_loops import CAUSAL, PACKED, may_look, numbers
from torch import Tensor

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.flex import Flex
from core.nn.kernel import Positions
from core.nn.mla import MLA
from core.nn.module import Flops
from core.nn.rope import RoPE
from core.nn.sdpa import SDPA
from core.nn.start import Constant, Normal, Scale
from core.nn.weights import parameter_count, training_flops_per_token, weights

DIM, N, Q, C, S, P, V = 10, 3, 7, 5, 4, 6, 8  # width, heads, both latents, plain, turned and value width of a head
ROPE = RoPE.Config(theta=100.0, layout="interleaved")


def build(q_lora_rank: int | None = Q, *, temperature: float = 1.0, v_head_dim: int = V, backend: Any = "sdpa") -> MLA:
    config = MLA.Config(
        n_heads=N,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=C,
        qk_nope_head_dim=S,
        qk_rope_head_dim=P,
        v_head_dim=v_head_dim,
        backend=backend,
    )
    layer = config.build(dim=DIM, norm_eps=0.5, scale=Scale(1.0, 1.0), temperature=temperature)
    for number, weight in enumerate(layer.parameters()):
        torch.nn.init.uniform_(weight, -1.0, 1.0, generator=torch.Generator().manual_seed(number))
    return layer


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean() + 1e-6).sqrt() * weight


def turned(x_P: Tensor, position: int) -> Tensor:
    """Pairs (0, 1), (2, 3), ... turned by position times 100^(-2i/P)."""
    parts = []
    for i in range(P // 2):
        turn = cmath.exp(1j * position * 100.0 ** (-2 * i / P))
        a, b = x_P[2 * i], x_P[2 * i + 1]
        parts += [a * turn.real - b * turn.imag, b * turn.real + a * turn.imag]
    return torch.stack(parts)


def by_loops(w: dict[str, Tensor], x_BLD: Tensor, positions: Positions, temperature: float) -> Tensor:
    """Section 2.1 of arXiv:2405.04434, token by token and head by head."""
    v_dim = w["wo.weight"].shape[1] // N
    rows = []
    for row, x_LD in enumerate(x_BLD):
        position_L = positions.position_BL[row if len(positions.position_BL) > 1 else 0].tolist()
        queries, keys, values = [], [], []
        for x_D, position in zip(x_LD, position_L, strict=True):
            if "wq.weight" in w:
                q = w["wq.weight"] @ x_D
            else:
                q = w["wq_b.weight"] @ normed(w["wq_a.weight"] @ x_D, w["q_norm.weight"])
            down = w["wkv_a.weight"] @ x_D
            up = w["wkv_b.weight"] @ normed(down[:C], w["kv_norm.weight"])
            shared = turned(down[C:], position)
            q_heads = [q[n * (S + P) : (n + 1) * (S + P)] for n in range(N)]
            up_heads = [up[n * (S + v_dim) : (n + 1) * (S + v_dim)] for n in range(N)]
            queries.append([torch.cat((head[:S], turned(head[S:], position))) for head in q_heads])
            keys.append([torch.cat((head[:S], shared)) for head in up_heads])
            values.append([head[S:] for head in up_heads])
        for query in range(len(x_LD)):
            seen = [key for key in range(len(x_LD)) if may_look(positions, None, row, query, key)]
            heads = []
            for n in range(N):
                logits = torch.stack([queries[query][n] @ keys[key][n] for key in seen])
                share = (logits * temperature**2 / (S + P) ** 0.5).softmax(-1)
                heads.append(sum(s * values[key][n] for s, key in zip(share, seen, strict=True)))
            rows.append(w["wo.weight"] @ torch.cat(heads))
    return torch.stack(rows).view_as(x_BLD)


@pytest.mark.parametrize("positions", [CAUSAL, PACKED], ids=["causal", "document"])
@pytest.mark.parametrize(
    ("q_lora_rank", "temperature", "v_head_dim"),
    [(None, 1.0, V), (Q, 1.0, V), (Q, 1.3, 2), (None, 0.7, S + P), (Q, 1.0, 14)],
)
def test_layer_and_its_gradients_equal_loops(
    positions: Positions, q_lora_rank: int | None, temperature: float, v_head_dim: int
) -> None:
    layer = build(q_lora_rank, temperature=temperature, v_head_dim=v_head_dim)
    x_BLD, grad_BLD = numbers(2, 12, DIM), numbers(2, 12, DIM, seed=1)
    doubles = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    x_leaf, x_float = x_BLD.clone().requires_grad_(), x_BLD.float().requires_grad_()
    expected = by_loops(doubles, x_leaf, positions, temperature)
    (expected * grad_BLD).sum().backward()
    out = layer(x_float, ROPE.build(head_dim=P)(positions.position_BL), layer.kernel.mask(positions))
    (out * grad_BLD.float()).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    pairs = {name: (weight.grad, doubles[name].grad) for name, weight in layer.named_parameters()}
    for name, (found, theirs) in {**pairs, "x": (x_float.grad, x_leaf.grad)}.items():
        error = (found.double() - theirs).norm() / theirs.norm()
        assert error < 1e-4, f"{name}: the gradient is off by {error:.1e}"


@torch.no_grad()
def test_keys_from_earlier_are_latents() -> None:
    """A cache holds C + P numbers of a token, whatever the number of heads, and answers as the whole row does."""
    layer, x_BLD = build(), numbers(2, 12, DIM, dtype=torch.float32)
    rope = ROPE.build(head_dim=P)
    whole = layer(x_BLD, rope(CAUSAL.position_BL), None)
    seen: list[tuple[Tensor, ...]] = []
    handle = layer.keys.register_forward_hook(lambda module, given, out: seen.append(out))
    layer(x_BLD[:, :9], rope(torch.arange(9)[None]), None)
    handle.remove()
    assert [side.shape for side in seen[0]] == [(2, 9, C), (2, 9, 1, P)]
    layer.keys.register_forward_hook(
        lambda module, given, out: tuple(torch.cat(pair, dim=1) for pair in zip(seen[0], out, strict=True))
    )
    last_L = torch.arange(9, 12)[None]
    mask = layer.kernel.mask(Positions(last_L, None, last_L, torch.arange(12)[None]))
    out = layer(x_BLD[:, 9:], rope(last_L), mask)
    torch.testing.assert_close(out, whole[:, 9:], rtol=0, atol=1e-5)


def test_bfloat16_autocast_stays_near() -> None:
    layer, x_BLD = build(), numbers(2, 12, DIM, dtype=torch.float32)
    rotation = ROPE.build(head_dim=P)(CAUSAL.position_BL)
    full = layer(x_BLD, rotation, None)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x_BLD, rotation, None)
    assert half.dtype == torch.bfloat16 and (half.float() - full).norm() / full.norm() < 0.05
    half.float().sum().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in layer.parameters())


@pytest.mark.parametrize("q_lora_rank", [None, Q])
def test_weights_by_hand(q_lora_rank: int | None) -> None:
    layer = build(q_lora_rank)
    found = {name: (tuple(value.shape), axes, start) for name, value, axes, start in weights(layer)}
    drawn, ones = Normal(1.0), Constant(1.0)
    queries = (
        {"wq.weight": ((N * (S + P), DIM), ("heads", "embed"), drawn)}
        if q_lora_rank is None
        else {
            "wq_a.weight": ((Q, DIM), ("lora", "embed"), drawn),
            "q_norm.weight": ((Q,), ("lora",), ones),
            "wq_b.weight": ((N * (S + P), Q), ("heads", "lora"), drawn),
        }
    )
    assert found == queries | {
        "wkv_a.weight": ((C + P, DIM), ("lora", "embed"), drawn),
        "kv_norm.weight": ((C,), ("lora",), ones),
        "wkv_b.weight": ((N * (S + V), C), ("heads", "lora"), drawn),
        "wo.weight": ((DIM, N * V), ("embed", "heads"), drawn),
    }


def test_flops_by_hand() -> None:
    """Two per weight of a matrix, and for each key a product of S + P numbers with a query and of V with its share."""
    attention = 3 * 2 * N * (S + P + V) * 100
    key_side = (C + P) * DIM + N * (S + V) * C + DIM * N * V
    assert training_flops_per_token(build(None), 100) == Flops(6 * (N * (S + P) * DIM + key_side), attention)
    assert training_flops_per_token(build(Q), 100) == Flops(6 * (Q * DIM + N * (S + P) * Q + key_side), attention)
    assert parameter_count(build(None)) == N * (S + P) * DIM + key_side + C


def test_config_chooses_the_kernel() -> None:
    assert build(backend="sdpa").kernel == SDPA() and build(backend="flex").kernel == Flex()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 0}, "n_heads: n_heads 0 must be at least 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank: kv_lora_rank 0 must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank: q_lora_rank 0 must be at least 1, or None"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim: qk_nope_head_dim 0 must be at least 1"),
        ({"v_head_dim": -1}, "v_head_dim: v_head_dim -1 must be at least 1"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim: qk_rope_head_dim 5 must be even"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim: qk_rope_head_dim 0 must be at least 1"),
        ({"backend": "math"}, "backend: no attention kernel is called 'math'. There is sdpa, tiles, flex"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    settings = {"n_heads": N, "q_lora_rank": Q, "kv_lora_rank": C, "qk_nope_head_dim": S, "qk_rope_head_dim": P}
    validate(MLA.Config(**settings, v_head_dim=V))
    with pytest.raises(UserError, match=message):
        validate(MLA.Config(**{**settings, "v_head_dim": V, **change}))
