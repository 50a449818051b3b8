"""Lion against its formula in the paper, SGD against PyTorch's."""

import pytest
import torch
from torch import Tensor, nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.start import Constant
from core.nn.weights import Weight
from core.optim.lion import Lion
from core.optim.optimizer import Optimizer
from core.optim.sgd import SGD
from core.parallel.layout import SingleRank

FACTORS = [0.5, 1.0, 0.25, 0.1]


def drawn(seed: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def built(config: Optimizer.Config, weight: nn.Parameter) -> Optimizer:
    named = [Weight("w.weight", weight, ("ffn", "embed"), Constant(0.0))]
    return config.build(weights=named, layout=SingleRank(torch.device("cpu")))


def test_lion_as_the_paper_writes_it() -> None:
    """theta - eta (sign(beta1 m + (1 - beta1) g) + lambda theta), then m of beta2; in double precision."""
    weight = nn.Parameter(drawn(0).double())
    optimizer = built(Lion.Config(lr=1e-2, weight_decay=0.5, beta1=0.8, beta2=0.95), weight)
    theta, m = weight.detach().clone(), torch.zeros(6, 5, dtype=torch.float64)
    for step, factor in enumerate(FACTORS):
        g, eta = drawn(1 + step).double(), 1e-2 * factor
        weight.grad = g.clone()
        optimizer.step(factor)
        theta = theta - eta * ((0.8 * m + 0.2 * g).sign() + 0.5 * theta)
        m = 0.95 * m + 0.05 * g
        torch.testing.assert_close(weight.detach(), theta)
        torch.testing.assert_close(optimizer.state["w.weight"]["exp_avg"], m)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_pytorch(momentum: float, nesterov: bool) -> None:
    """Without decay, which PyTorch adds to the gradient; here it shrinks the weight, by hand in the reference."""
    ours, theirs = nn.Parameter(drawn(0)), nn.Parameter(drawn(0))
    optimizer = built(SGD.Config(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.5), ours)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=momentum, nesterov=nesterov)
    for step, factor in enumerate(FACTORS):
        ours.grad, theirs.grad = drawn(1 + step), drawn(1 + step)
        with torch.no_grad():
            theirs.mul_(1 - 0.1 * factor * 0.5)
        reference.param_groups[0]["lr"] = 0.1 * factor
        optimizer.step(factor)
        reference.step()
        torch.testing.assert_close(ours, theirs)
    assert list(optimizer.state["w.weight"]) == (["momentum"] if momentum else [])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Lion.Config(beta1=1.0), r"beta1: beta1 1.0 must be in \[0, 1\)"),
        (SGD.Config(momentum=-0.1), r"momentum: momentum -0.1 must be in \[0, 1\)"),
        (SGD.Config(momentum=0.0, nesterov=True), "nesterov: nesterov with momentum 0 changes nothing"),
    ],
)
def test_settings_of_lion_and_sgd_that_make_no_sense(config: Optimizer.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(config)
