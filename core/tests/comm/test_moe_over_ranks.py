"""Experts on 1, 2 and 4 ranks, over every transport, against all of them in one place.

The oracle computes every expert on every token in fp64, with the weights of the choices.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from carriers import CARRIERS, EQUAL, dispatcher_over, wants_equal
from token_traffic import CASES, D, E, Shuffled, Traffic, numbers_like, traffic
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from core.comm.all_to_all import AllToAll
from core.comm.backend import by_reference
from core.comm.deepep import DeepEP
from core.comm.hybridep import HybridEP
from core.comm.transport import bind
from core.nn.dispatch import Dispatcher
from core.nn.moe import Experts
from core.nn.start import Scale
from core.testing.ranks import run_ranks

F = 6
ATOL = 1e-6
"""Largest difference, as a share of the largest number of its kind."""


def shuffled(group: ProcessGroup) -> DeepEP:
    bind(group, Shuffled(group))
    return DeepEP(group)


LIBRARIES = {name: carrier for name, carrier in CARRIERS.items() if carrier.build is not None}
DISPATCHERS: dict[str, Callable[[ProcessGroup], Dispatcher]] = {
    "standard": AllToAll,
    "reference": by_reference,
    "deepep, rows in any order": shuffled,
    "hybridep": HybridEP,
    "hybridep, padded": partial(HybridEP, pad_multiple=4),
    "hybridep, with room for all": partial(HybridEP, capacity_factor=1.0, pad_multiple=2),
    **{name: partial(dispatcher_over, name, n_tokens=EQUAL if wants_equal(name) else 32) for name in LIBRARIES},
    "hybridep 11, with room for all": partial(
        dispatcher_over, "hybridep 11", n_tokens=EQUAL, capacity_factor=1.0, pad_multiple=4
    ),
}


def whole_experts() -> Experts:
    """All experts, with biases, of numbers that matter."""
    experts = Experts.Config(hidden_dim=F, bias=True).build(n_experts=E, dim=D, scale=Scale(1.0, 1.0))
    generator = torch.Generator().manual_seed(5)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.1, generator=generator)
    return experts


def experts_here(group: ProcessGroup) -> Experts:
    """Those that live on this rank."""
    experts, n_here = whole_experts(), E // group.size()
    for product in (experts.w1, experts.w3, experts.w2):
        for name, weight in list(product.named_parameters()):
            setattr(product, name, nn.Parameter(weight.detach().split(n_here)[group.rank()].clone()))
    return experts


class Sent(NamedTuple):
    """What a rank puts in, as leaves, and what it multiplies the result with."""

    x: Tensor
    ids: Tensor
    weight: Tensor
    grad: Tensor


def sent(case: str, rank: int, n_tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Sent:
    drawn: Traffic = traffic(case, rank, n_tokens)
    x = numbers_like(drawn.x_TD, 50 + rank).to(dtype).requires_grad_()
    weight = drawn.weight_TK.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return Sent(x, drawn.ids_TK, weight, numbers_like(drawn.x_TD, 90 + rank).to(dtype))


def through(dispatcher: Dispatcher, experts: Experts, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    rows = dispatcher.dispatch(x, ids, weight, E)
    return dispatcher.combine(experts(rows.x_RD, rows.counts_G) * rows.weight_R.unsqueeze(-1), rows.back)


def results(experts: nn.Module, passes: list[tuple[Sent, Tensor]]) -> dict[str, Any]:
    """Backward through all passes, the last first; outputs and all gradients."""
    for put, y in passes:
        (y * put.grad).sum().backward()
    weights = {name: weight.grad for name, weight in experts.named_parameters()}
    tokens = [(y.detach(), put.x.grad, put.weight.grad) for put, y in passes]
    return {
        "weights": weights,
        **{f"pass {i}": dict(zip(["y", "x", "weight"], t, strict=True)) for i, t in enumerate(tokens)},
    }


def cases_seen(kind: str) -> dict[str, Any]:
    """What every case gives over this transport, one after the other through the same dispatcher."""
    group, seen = dist.group.WORLD, {}
    dispatcher, rank = DISPATCHERS[kind](group), group.rank()
    for case in suited(kind):
        experts, put = experts_here(group), sent(case, rank, tokens_of(kind))
        seen[case] = results(experts, [(put, through(dispatcher, experts, *put[:3]))])
    experts, puts = experts_here(group), [sent(case, rank, n) for case, n in interleaved(kind)]
    passes = [(put, through(dispatcher, experts, *put[:3])) for put in puts]
    seen["interleaved"] = results(experts, passes)
    return seen


def interleaved(kind: str) -> tuple[tuple[str, int], ...]:
    """Two microbatches: forward, forward, backward, backward, as in a pipeline."""
    return ("mixed", tokens_of(kind) or 7), ("all experts", EQUAL if of_equal_tokens(kind) else 5)


def of_equal_tokens(kind: str) -> bool:
    return kind.partition(",")[0] in LIBRARIES and wants_equal(kind.partition(",")[0])


def suited(kind: str) -> list[str]:
    """The cases that a transport can have: the standard one knows no masked choices, HybridEP with a capacity wants
    equally many tokens on all ranks, and its library some."""
    unfit = {"standard": ["masked", "nothing chosen"], "hybridep, with room for all": ["a rank without tokens"]}
    if of_equal_tokens(kind):
        unfit[kind] = ["a rank without tokens", "no tokens at all"]
    return [case for case in CASES if case not in unfit.get(kind, [])]


def tokens_of(kind: str) -> int | None:
    return EQUAL if of_equal_tokens(kind) else 7 if "room" in kind else None


@cache
def seen(kind: str, size: int) -> list[dict[str, Any]]:
    return run_ranks(cases_seen, size, kind)


def dense(experts: nn.Module, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Every expert on every token, weighed by the choices of that expert."""
    y = torch.zeros_like(x)
    w = dict(experts.named_parameters())
    for expert in range(E):

        def times(name: str, rows: Tensor, expert: int = expert) -> Tensor:
            return rows @ w[f"{name}.weight"][expert].T + w[f"{name}.bias"][expert]

        share = (weight * (ids == expert)).sum(1, keepdim=True)
        gate = times("w1", x)
        y = y + share * times("w2", gate * gate.sigmoid() * times("w3", x))
    return y


@cache
def expected(passes: tuple[tuple[str, int | None], ...], size: int) -> list[dict[str, Any]]:
    """What each rank should find, all of it computed here."""
    experts, ranks = whole_experts().double(), []
    for rank in range(size):
        puts = [sent(case, rank, n, torch.float64) for case, n in passes]
        pieces = [(put, dense(experts, *put[:3])) for put in puts]
        ranks.append(results(experts, pieces))
    for rank, found in enumerate(ranks):
        whole = {name: weight.grad for name, weight in experts.named_parameters()}
        found["weights"] = {name: grad.chunk(size)[rank] for name, grad in whole.items()}
    return ranks


def assert_equal(found: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """Every tensor of every rank, the largest number of its kind on any rank being 1."""
    for part in right[0]:
        for name in right[0][part]:
            size = max([1e-3, *(rank[part][name].abs().max().item() for rank in right if rank[part][name].numel())])
            for mine, theirs in zip(found, right, strict=True):
                a, b = mine[part][name], theirs[part][name]
                assert a.shape == b.shape and a.dtype == torch.float32, f"{part} {name}: {a.shape}, {a.dtype}"
                error = (a - b).abs().max().item() / size if b.numel() else 0.0
                assert error <= ATOL, f"{part} {name}: off by {error:.1e}"


EACH = [
    (kind, case, size)
    for kind in DISPATCHERS
    for case in [*suited(kind), "interleaved"]
    for size in ([2, 4] if kind.partition(",")[0] in LIBRARIES else [1, 2, 4])
]


@pytest.mark.parametrize(("kind", "case", "size"), EACH, ids=[f"{kind}, {case}, {n}" for kind, case, n in EACH])
def test_equals_all_experts_in_one_place(kind: str, case: str, size: int) -> None:
    passes = interleaved(kind) if case == "interleaved" else ((case, tokens_of(kind)),)
    assert_equal([rank[case] for rank in seen(kind, size)], expected(passes, size))


def overflowing(kind: str) -> str:
    """A capacity of a tenth of what could arrive, in which half of that will not fit."""
    experts, put = experts_here(dist.group.WORLD), sent("all experts", dist.get_rank(), 8)
    dispatcher = dispatcher_over(kind, dist.group.WORLD, n_tokens=8, capacity_factor=0.1)
    try:
        through(dispatcher, experts, *put[:3])
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["hybridep reference", "hybridep 9", "hybridep 11"])
def test_an_overflow_ends_the_run(kind: str) -> None:
    for message in run_ranks(overflowing, 2, kind):
        assert "more rows arrived than there is room for. Raise parallelism.hybridep_non_blocking_expert_cap" in message


def losses(kind: str, n_steps: int) -> list[float]:
    """The losses of a layer that learns on other tokens in every step, another number of them on each rank."""
    group = dist.group.WORLD
    dispatcher, experts = DISPATCHERS[kind](group), experts_here(group)
    gate, generator = torch.randn(E, D, generator=torch.Generator().manual_seed(1)) / 10, torch.Generator()
    gate.requires_grad_()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.mul_(5)
    found = []
    for step in range(n_steps):
        generator.manual_seed(1000 * step + group.rank())
        x = torch.randn(int(torch.randint(12, (1,), generator=generator)), D, generator=generator) / 4
        scores = (x @ gate.T).softmax(-1)
        ids = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :2]
        y = through(dispatcher, experts, x, ids, scores.gather(1, ids))
        loss = (y - x[:, :1]).square().sum()
        loss.backward()
        dist.all_reduce(gate.grad)
        with torch.no_grad():
            for weight in (gate, *experts.parameters()):
                weight.sub_(weight.grad, alpha=1e-3)
                weight.grad = None
        found.append(loss.item())
    return found


def test_a_long_run_ends_with_the_same_bits() -> None:
    """With two choices a token's sums have two terms at most: no order of addition can change them."""
    standard, by_reference = (run_ranks(losses, 4, kind, 100) for kind in ("standard", "reference"))
    assert standard == by_reference
    assert sum(sum(rank[-20:]) for rank in standard) < 0.9 * sum(sum(rank[:20]) for rank in standard)


def copies_in_bfloat16() -> tuple[Tensor, Tensor, Tensor]:
    """A token whose four experts live here and answer 256, 1, 1, 1; their gradients are the same."""
    dispatcher, x = DeepEP(dist.group.WORLD), torch.ones(1, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(1, 4, requires_grad=True)
    rows = dispatcher.dispatch(x, torch.tensor([[3, 0, 7, 5]]), weight, E)
    answers = torch.tensor([256.0, 1.0, 1.0, 1.0]).view(4, 1)
    y = dispatcher.combine(rows.x_RD * answers * rows.weight_R.unsqueeze(-1), rows.back)
    (rows.x_RD * answers).sum().backward()
    return y, x.grad, rows.weight_R


def test_copies_of_a_token_are_summed_in_fp32() -> None:
    ((y, x_grad, weight_R),) = run_ranks(copies_in_bfloat16, 1)
    assert y.dtype == x_grad.dtype == torch.bfloat16 and weight_R.dtype == torch.float32
    assert y.tolist() == x_grad.tolist() == [[260.0] * D], "rounded once: 256 when each sum is rounded"
