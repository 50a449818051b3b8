"""Toys whose layers have sizes that every converter takes, and steps of them whose scales are written down."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from core.nn.attention import Attention
from core.nn.feed_forward import FeedForward
from core.nn.moe import Experts, MoE, Router
from core.nn.product import layer_products
from core.parallel.layout import RankView
from core.quantization.product import QuantisedProduct
from core.step.assemble import BuiltModel
from core.step.update import StepInfo
from core.testing import parity
from core.testing.parity import Case, StepResult, largest_differences, result_of
from core.testing.ranks import run_ranks
from core.testing.toy import Toy, ToyMoE

EXACT: dict[str, Any] = {"weights_dtype": torch.float64, "compute_dtype": torch.float64}
"""So that sums in another order round to the same few bits."""


def attention() -> Attention.Config:
    return Attention.Config(n_heads=4, n_kv_heads=2, head_dim=32, qk_norm=True, bias=True)


def dense(**changes: Any) -> Toy.Config:
    """A dense toy; tensor parallelism over two ranks leaves multiples of 32."""
    return Toy.Config(
        **{
            "vocab_size": 62,
            "dim": 64,
            "attention": attention(),
            "feed_forward": FeedForward.Config(hidden_dim=128),
            **changes,
        }
    )


def sparse() -> ToyMoE.Config:
    """A toy of a dense block and a mixture of experts, of which one gets no token, with a shared one."""
    moe = MoE.Config(
        router=Router.Config(n_experts=4, top_k=2, load_balance_coeff=1e-3),
        experts=Experts.Config(hidden_dim=32, bias=True),
        shared_experts=FeedForward.Config(hidden_dim=64),
    )
    return ToyMoE.Config(
        vocab_size=62, dim=64, attention=attention(), feed_forward=FeedForward.Config(hidden_dim=64), moe=moe
    )


def wide() -> ToyMoE.Config:
    """The same with experts whose weights have rows of 64 numbers and more."""
    config = sparse()
    assert config.moe is not None
    config.moe.experts.hidden_dim = 64
    return config


Maxima = dict[str, set[tuple[float, ...]]]


def written_down(case: Case) -> tuple[StepResult, Maxima]:
    """What two steps did, and for each converted layer the largest numbers that its scales were made of in the first:
    in the second, weights differ by the rounding of gradients that were summed in another order. A pipeline's trial, in
    evaluation mode, reads memory that nobody has written, and does not count."""
    found: Maxima = {}
    named: dict[int, tuple[str, nn.Module]] = {}
    build, largest, step_once = parity.build_case, QuantisedProduct.largest, parity.train_step
    steps: list[int] = []

    def counted(*given: Any, step: int, **settings: Any) -> StepInfo:
        steps.append(step)
        return step_once(*given, step=step, **settings)

    def built(case: Case, layout: RankView) -> BuiltModel:
        found = build(case, layout)
        for model in found.models:
            paths = {id(module): path for path, module in model.named_modules()}
            named.update({id(product): (paths[id(layer)], layer) for layer, product in layer_products(model)})
        return found

    def noted(product: QuantisedProduct, *asked: Tensor | None) -> list[Tensor | None]:
        maxima = largest(product, *asked)
        every = [*maxima[:1], product.weight_amax or maxima[1]] if len(maxima) == 2 else maxima
        numbers = tuple(torch.tensor(x.item(), dtype=torch.float32).item() for x in every if x is not None)
        name, layer = named[id(product)]
        if steps == [1] and layer.training:
            found.setdefault(name, set()).add(numbers)
        return maxima

    with (
        mock.patch.object(parity, "build_case", built),
        mock.patch.object(parity, "train_step", counted),
        mock.patch.object(QuantisedProduct, "largest", noted),
    ):
        return result_of(case), found


def of_each(cases: dict[str, Case]) -> dict[str, tuple[StepResult, Maxima]]:
    """`written_down` of several cases, on one set of ranks."""
    return {name: written_down(case) for name, case in cases.items()}


def one_rank(case: Case, **changes: Any) -> Case:
    """The same step on one rank."""
    return replace(parity.alone(case), **changes)


def check_layouts(
    cases: dict[str, Case], rounded: Mapping[str, float] = MappingProxyType({}), timeout_s: float = 120.0
) -> None:
    """Compare cases on two ranks, all on one set of them, with one rank: the maxima of scales that see a whole tensor
    bit for bit, and the steps, whose gradients may differ in cases that are `rounded` by this share of the largest. A
    pipeline has microbatches of a row."""
    found = run_ranks(of_each, 2, cases, timeout_s=timeout_s)
    for name, case in cases.items():
        piped = case.parallelism.pipeline_parallel_degree > 1
        expected, maxima = written_down(one_rank(case, local_batch_size=1 if piped else -1))
        seen = [ranks[name][1] for ranks in found]
        assert {layer for each in seen for layer in each} == maxima.keys(), name
        for each in seen:
            for layer, numbers in each.items():
                assert maxima[layer] == numbers, (name, layer)
        differences = largest_differences([ranks[name][0] for ranks in found], expected)
        assert differences["loss"] < 1e-6, (name, differences)
        assert differences["next loss"] < (1e-3 if name in rounded else 1e-6), (name, differences)
        assert differences["gradient"] < rounded.get(name, 1e-5), (name, differences)
