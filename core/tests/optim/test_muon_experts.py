"""Experts on two ranks, trained by Muon over many steps: the weights of one rank, where rounding is small enough.

In fp32 a sum in another order may turn the choice of an expert where two are equally good, and from there on two runs
are two runs. Numbers of 64 bits leave 29 bits more between what is rounded and what is chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from core.nn.balance import routers
from core.optim.adam import AdamW
from core.optim.muon import Muon
from core.parallel.layout import RankView, SingleRank
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.update import train_step
from core.testing.parity import Case, alone, batches_of, build_case, full
from core.testing.ranks import run_ranks
from core.testing.toy import ToyMoE

STEPS, FLOOR = 40, 1e-10


class Trained(NamedTuple):
    """What a rank has of many steps: the loss of each, how often its experts were chosen, and whole weights."""

    losses: list[float]
    counts: Tensor
    weights: dict[str, Tensor]


@contextmanager
def in_fp64() -> Iterator[None]:
    """What the code computes in 32 bits is computed in 64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(usual)


def experts_case() -> Case:
    """Eight experts of rank 12, of which some see a few tokens a step, or none; two microbatches on one rank."""
    model = ToyMoE.Config(vocab_size=61, n_layers=3)
    model.moe.router.n_experts = 8
    optimizer = Muon.Config(lr=2e-2, companion=AdamW.Config(lr=1e-2, eps=1e-6))
    types = {"weights_dtype": torch.float64, "compute_dtype": torch.float64}
    parallelism = Parallelism(expert_parallel_degree=2)
    return Case(model, parallelism, 2, optimizer=optimizer, local_batch_size=4, **types)


def trained(case: Case) -> Trained:
    """This rank's part of many steps in fp64, each on other tokens."""
    with in_fp64():
        cpu = torch.device("cpu")
        layout: RankView = SingleRank(cpu) if case.world_size == 1 else ManyRanks(case.parallelism, cpu)
        built = build_case(case, layout)
        settings = {"layout": layout, "dtype": case.compute_dtype, "mask": case.mask}
        objective = Objective(built.models, CrossEntropy.Config().build(), **settings)
        optimizer: Muon = case.optimizer.build(weights=built.weights(), layout=layout)
        batches, counts, losses = batches_of(case, layout), [], []
        for step in range(1, STEPS + 1):
            moved = [each._replace(tokens_BL=(each.tokens_BL + step) % case.model.vocab_size) for each in batches]
            limits = {"lr_factor": 1 - step / (2 * STEPS), "max_norm": 1.0}
            losses.append(train_step(objective, optimizer, moved, step=step, on_nonfinite="stop", **limits).loss)
            counts.append(torch.stack([router.tokens_E for router in routers(built.models[0]).values()]))
        after = {name: full(weight.detach()).clone() for name, weight in built.named_parameters()}
        return Trained(losses, torch.stack(counts), after)


@pytest.mark.layout
def test_experts_on_two_ranks_are_trained_as_on_one() -> None:
    case = experts_case()
    expected = trained(alone(case))
    assert expected.losses[0] - expected.losses[-1] > 0.5, "too little was learned to tell layouts apart"
    few = (expected.counts > 0) & (expected.counts < 8)
    assert few.any() and (expected.counts == 0).any(), "every expert saw many tokens"
    for found in run_ranks(trained, 2, case):
        assert torch.equal(found.counts, expected.counts)
        assert found.losses == pytest.approx(expected.losses, rel=FLOOR, abs=0)
        for name, weight in found.weights.items():
            assert weight.dtype == torch.float64
            torch.testing.assert_close(weight, expected.weights[name], rtol=FLOOR, atol=FLOOR, msg=name)
