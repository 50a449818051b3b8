"""The journey of tokens inside one graph of torch.compile, with and without checkpointing, equal to eager."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from carriers import CARRIERS, carry, deterministic, wants_equal
from token_traffic import D, E, Watched, numbers_like, traffic
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.comm.deepep import DeepEP
from core.comm.hybridep import HybridEP
from core.comm.transport import bind
from core.nn.dispatch import Dispatcher
from core.nn.grouped import grouped_mm
from core.testing.ranks import run_ranks

MODES: list[Any] = [None, "selective", "full"]


def layer(dispatcher: Dispatcher, weight_GDD: Tensor, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    rows = dispatcher.dispatch(x, ids, weight, E)
    y = grouped_mm(rows.x_RD, weight_GDD, rows.counts_G).sigmoid() * rows.weight_R.unsqueeze(-1)
    return dispatcher.combine(y, rows.back).sin()


def checkpointed(policy: Any, *args: Any) -> Tensor:
    return checkpoint(layer, *args, use_reentrant=False, context_fn=policy)


def results(forward: Any, weight_GDD: Tensor, case: str, n_tokens: int) -> list[Tensor]:
    x, ids, weight = traffic(case, dist.get_rank(), n_tokens)
    leaves = [weight_GDD.detach().requires_grad_(), numbers_like(x, 1).requires_grad_(), weight.requires_grad_()]
    y = forward(leaves[0], leaves[1], ids, leaves[2])
    return [y.detach(), *torch.autograd.grad((y * numbers_like(y, 2)).sum(), leaves)]


def compiled_and_eager(carrier: str, settings: dict[str, Any]) -> list[Any]:
    """For each mode: whether all results were equal, and the calls of the compiled layer."""
    group, found, namespace = dist.group.WORLD, [], CARRIERS[carrier].namespace
    deterministic()
    transport = carry(carrier, group, n_tokens=8 if wants_equal(carrier) else 16)
    n_tokens = (8, 8, 8) if wants_equal(carrier) else (6, 6, 9)
    torch._dynamo.config.capture_scalar_outputs = torch._dynamo.config.capture_dynamic_output_shape_ops = True
    dispatcher = DeepEP(group) if namespace == "deepep" else HybridEP(group, **settings)
    weight_GDD = torch.randn(E // group.size(), D, D, generator=torch.Generator().manual_seed(group.rank()))
    for mode in MODES:
        policy = None if mode is None else default_activation_checkpoint_policy(mode=mode)
        forward = partial(layer, dispatcher) if policy is None else partial(checkpointed, policy, dispatcher)
        fast = torch.compile(forward, backend="aot_eager", fullgraph=True)
        bind(group, watched := Watched(transport))
        equal = True
        for case, n in zip(("mixed", "all to one rank", "mixed"), n_tokens, strict=True):
            ours = results(fast, weight_GDD, case, n)
            theirs = results(partial(layer, dispatcher), weight_GDD, case, n)
            equal = equal and all(map(torch.equal, ours, theirs))
        found.append((equal, dict(watched.calls)))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo does, torch 2.13
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
@pytest.mark.parametrize(
    ("carrier", "settings"),
    [
        pytest.param("deepep reference", {}, marks=pytest.mark.matrix),
        pytest.param("hybridep reference", {"pad_multiple": 2}, marks=pytest.mark.matrix),
        pytest.param("hybridep reference", {"capacity_factor": 1.0, "pad_multiple": 2}, marks=pytest.mark.matrix),
        ("deepep v2.1", {}),
        ("hybridep 11", {"capacity_factor": 1.0, "pad_multiple": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "plain",
)
def test_compiled_equals_eager(carrier: str, settings: dict[str, Any]) -> None:
    """Of twice three steps the eager half travels once each way, and so does the compiled one but in mode full."""
    for rank in run_ranks(compiled_and_eager, 2, carrier, settings, timeout_s=300):
        for mode, (equal, calls) in zip(MODES, rank, strict=True):
            assert equal, f"{mode}: compiled and eager differ"
            again = 3 if mode == "full" else 0
            there = {"dispatch": 6 + again, "combine": 6 + again}
            assert calls == {**there, "dispatch_cached": 6, "combine_weights": 6}, f"{mode}: {calls}"
