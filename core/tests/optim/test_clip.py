"""Clipping against PyTorch's own, and against the definition."""

import math

import pytest
import torch
from torch import Tensor, nn

from core.optim.clip import clip_gradients


def gradients(size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (), (2, 2, 2))]


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 10.0])
def test_equals_pytorch_bit_for_bit(size: float, max_norm: float) -> None:
    ours, theirs = gradients(size), [nn.Parameter(torch.zeros_like(g)) for g in gradients(size)]
    for weight, gradient in zip(theirs, gradients(size), strict=True):
        weight.grad = gradient
    norm = clip_gradients(ours, max_norm)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for gradient, weight in zip(ours, theirs, strict=True):
        assert torch.equal(gradient, weight.grad)


def test_the_joint_norm_is_given_and_cut() -> None:
    found = [torch.tensor([3.0, 0.0]), torch.tensor(4.0)]
    assert clip_gradients(found, 2.5).item() == 5.0
    torch.testing.assert_close(found, [torch.tensor([1.5, 0.0]), torch.tensor(2.0)])


def test_small_gradients_are_untouched() -> None:
    found = gradients(1e-4)
    clip_gradients(found, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(found, gradients(1e-4), strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_broken_gradient_shows_in_the_norm(bad: float) -> None:
    found = [*gradients(1.0), torch.tensor([1.0, bad])]
    assert not clip_gradients(found, 1.0).isfinite()
