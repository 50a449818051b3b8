"""Linear, Embedding, RMSNorm and SwiGLU against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.feed_forward import FeedForward
from core.nn.layers import Embedding, Head, Linear, RMSNorm
from core.nn.module import Flops
from core.nn.start import Normal, Scale


def test_linear() -> None:
    layer = Linear(3, 2, std=0.1, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    assert layer(torch.tensor([1.0, 1.0, 2.0])).tolist() == [19.0, 20.0]
    assert layer.flops_per_token(7) == Flops(matmul=12)
    assert Linear(3, 2, std=0.1).bias is None


def test_embedding() -> None:
    layer = Embedding(4, 2, std=0.3)
    torch.nn.init.normal_(layer.weight)
    assert torch.equal(layer(torch.tensor([[3, 0]])), layer.weight[[3, 0]][None])
    assert layer.flops_per_token(7) == Flops()
    assert layer.start == {"weight": Normal(0.3)}


def test_head_names_its_axes() -> None:
    assert Head.AXES == Embedding.AXES == {"weight": ("vocab", "embed")}


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(eps: float) -> None:
    layer = RMSNorm(8, eps=eps).double()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    for row, out in zip(x, layer(x), strict=True):
        mean_square = sum(value**2 for value in row.tolist()) / 8
        expected = [
            v / (mean_square + eps) ** 0.5 * w for v, w in zip(row.tolist(), layer.weight.tolist(), strict=True)
        ]
        torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64))


def test_rms_norm_keeps_the_dtype_that_autocast_on_cuda_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """There rms_norm is on the list of operations that compute in fp32 and hand fp32 on."""
    plain = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, n, w, eps: plain(x.float(), n, w.float(), eps))
    x = torch.randn(3, 4).bfloat16()
    assert RMSNorm(4, eps=1e-6)(x).dtype == torch.bfloat16


def test_rms_norm_keeps_the_dtype_of_its_input() -> None:
    """Weights in fp32 beside activations in bf16, as under autocast: no promotion, statistics in fp32."""
    layer = RMSNorm(256, eps=1e-6)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x.float()), rtol=2e-2, atol=1e-2)


def test_swiglu() -> None:
    layer = FeedForward.Config(hidden_dim=6).build(dim=4, scale=Scale(1.0, 1.0)).double()
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    gate, up = x @ layer.w1.weight.T, x @ layer.w3.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_swiglu_needs_a_width() -> None:
    with pytest.raises(UserError, match="hidden_dim: hidden_dim 0 must be at least 1"):
        validate(FeedForward.Config(hidden_dim=0))
