"""What joins a hidden state with the token that came next, by hand."""

import pytest
import torch

from core.nn.module import Flops
from core.nn.mtp import Merge
from core.nn.start import Constant, Normal
from core.nn.weights import training_flops_per_token, weights


def test_the_next_token_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides normed with weights of their own, side by side, the embedding first, as published."""
    monkeypatch.setattr("core.nn.layers.cpu_forms", lambda x: None)  # PyTorch's norm is exact here
    merge = Merge(2, norm_eps=0.0, std=0.5)
    with torch.no_grad():
        merge.enorm.weight.copy_(torch.tensor([1.0, 10.0]))
        merge.hnorm.weight.copy_(torch.tensor([100.0, 1000.0]))
        merge.eh_proj.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
    h_BLD, next_BLD = torch.tensor([[[3.0, -3.0]]]), torch.tensor([[[5.0, 5.0]]])
    assert merge(h_BLD, next_BLD).tolist() == [[[1.0 + 10.0, 100.0 - 1000.0]]]


def test_weights_by_hand() -> None:
    merge, one = Merge(6, norm_eps=1e-6, std=0.5), Constant(1.0)
    assert {name: (tuple(value.shape), axes, start) for name, value, axes, start in weights(merge)} == {
        "enorm.weight": ((6,), ("embed",), one),
        "hnorm.weight": ((6,), ("embed",), one),
        "eh_proj.weight": ((6, 12), ("embed", "merge"), Normal(0.5)),
        "norm.weight": ((6,), ("embed",), one),
    }
    assert training_flops_per_token(merge, 100) == Flops(6 * 6 * 12)
