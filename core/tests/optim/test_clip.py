"""Clipping against PyTorch's own, and against the definition."""

import math

import pytest
import torch
from torch import Tensor, nn

from core.optim.clip import cut_values, scale_down, squared_norms
from core.parallel.layout import SingleRank


def gradients(size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (), (2, 2, 2))]


def joint_norm(found: list[Tensor]) -> float:
    return SingleRank(torch.device("cpu")).joint_norm(squared_norms(found))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 10.0, math.inf])
def test_equals_pytorch(size: float, max_norm: float) -> None:
    ours, theirs = gradients(size), [nn.Parameter(torch.zeros_like(g)) for g in gradients(size)]
    for weight, gradient in zip(theirs, gradients(size), strict=True):
        weight.grad = gradient
    norm = joint_norm(ours)
    scale_down(ours, norm, max_norm)
    assert norm == pytest.approx(nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-6)
    for gradient, weight in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-6, atol=0)


def test_the_joint_norm_is_cut() -> None:
    found = [torch.tensor([3.0, 0.0]), torch.tensor(4.0)]
    assert joint_norm(found) == 5.0
    scale_down(found, 5.0, 2.5)
    torch.testing.assert_close(found, [torch.tensor([1.5, 0.0]), torch.tensor(2.0)])


def test_small_gradients_stay_as_they_are() -> None:
    found = [torch.tensor([0.3, 0.4])]
    scale_down(found, joint_norm(found), 1.0)
    assert torch.equal(found[0], torch.tensor([0.3, 0.4]))


def test_a_norm_that_is_not_finite_is_given() -> None:
    assert math.isnan(joint_norm([torch.tensor([1.0, math.nan])]))
    assert joint_norm([torch.tensor([1.0, math.inf])]) == math.inf


def test_the_norm_of_none_is_zero() -> None:
    assert joint_norm([]) == 0.0
    scale_down([], 0.0, 1.0)
    cut_values([], 1.0)


@pytest.mark.parametrize("max_value", [0.1, 1.0, math.inf])
def test_numbers_are_cut_as_by_pytorch(max_value: float) -> None:
    ours, theirs = gradients(1.0), [nn.Parameter(torch.zeros_like(g)) for g in gradients(1.0)]
    for weight, gradient in zip(theirs, gradients(1.0), strict=True):
        weight.grad = gradient
    cut_values(ours, max_value)
    nn.utils.clip_grad_value_(theirs, max_value)
    assert all(torch.equal(gradient, weight.grad) for gradient, weight in zip(ours, theirs, strict=True))
