"""What activation checkpointing does with the journey of tokens: how often it is made, and what is left of it."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import fake_deep_ep
import pytest
import torch
import torch.distributed as dist
from carriers import CARRIERS, carry, shuffles
from token_traffic import Shuffled, Watched, reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.comm import ops
from core.comm.deepep import DeepEP
from core.comm.hybridep import HybridEP
from core.comm.transport import bind, release
from core.config.errors import UserError
from core.nn.balance import start_step
from core.nn.moe import MoE
from core.testing.activation_checkpoint import checkpoint_blocks
from core.testing.ranks import run_ranks
from core.testing.toy import ToyMoE, on_cpu, randomise

N_LAYERS = 3  # of which two are mixtures
MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    "selective, early stop": {"mode": "selective", "early_stop": True},
    "full, early stop": {"mode": "full", "early_stop": True},
}


def spread_model(namespace: str) -> ToyMoE:
    """A small model whose experts are shared out among the ranks, and reached by these operations."""
    group, config = dist.group.WORLD, ToyMoE.Config(n_layers=N_LAYERS)
    config.moe.router.n_experts, config.moe.shared_experts = 8, None
    model = on_cpu(config)
    randomise(model, 3)
    for moe in model.modules():
        if isinstance(moe, MoE):
            moe.dispatcher = DeepEP(group) if namespace == "deepep" else HybridEP(group, pad_multiple=2)
            for product in (moe.experts.w1, moe.experts.w3, moe.experts.w2):
                product.weight = nn.Parameter(product.weight.detach().chunk(group.size())[group.rank()].clone())
    return model


def step(model: ToyMoE) -> dict[str, Tensor]:
    """Loss and gradients of some tokens."""
    start_step(model, 1)
    tokens_BL = torch.arange(20).view(2, 10) + 7 * dist.get_rank()
    loss = model(tokens_BL).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: weight.grad for name, weight in model.named_parameters()}}


def watch(transport: Any) -> Watched:
    bind(dist.group.WORLD, watched := Watched(transport))
    return watched


def steps_in_modes(carrier: str) -> dict[str, tuple[Counter[str], list[int], dict[str, Tensor]]]:
    """`steps_in_mode` of every mode."""
    found = {}
    for name in MODES:
        found[name] = steps_in_mode(carrier, name)
        release()
    return found


def steps_in_mode(carrier: str, name: str) -> tuple[Counter[str], list[int], dict[str, Tensor]]:
    """Calls of a step, how many tensors live after a step, after one without gradients and after an error, results.

    Counted are those that went out of the transport, and those that the imitation of a library gave it.
    """
    model = spread_model(CARRIERS[carrier].namespace)
    checkpoint_blocks(model, **MODES[name])
    watched = watch(carry(carrier, dist.group.WORLD, dim=model.config.dim, n_tokens=20))
    step(model)
    model.zero_grad()
    watched.calls.clear()
    found = step(model)
    calls, left = watched.calls.copy(), [watched.alive() + fake_deep_ep.alive()]
    with torch.no_grad():
        model.eval()(torch.arange(20).view(2, 10))
    left.append(watched.alive() + fake_deep_ep.alive())
    model.train()

    def fail(x_RD: Tensor, counts_G: Tensor) -> Tensor:
        raise ArithmeticError

    model.layers["2"].moe.experts.forward = fail
    with pytest.raises(ArithmeticError):
        step(model)
    gc.unfreeze()  # what the rank began with may be part of the circle
    for _ in range(2):  # the first closes the checkpoint's generators, whose frames the traceback had
        gc.collect()
    left.append(watched.alive() + fake_deep_ep.alive())
    assert bool(fake_deep_ep.GIVEN) == (CARRIERS[carrier].build is not None)
    return calls, left, found


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_mode_makes_the_same_journey(carrier: str) -> None:
    """Selective never travels again, full does, and backward goes each way once; all give the same bits.

    But for a library that brings rows in another order each time, and so adds them up in another.
    """
    n_moe = N_LAYERS - 1
    for rank in run_ranks(steps_in_modes, 2, carrier, timeout_s=120):
        expected = rank["none"][2]
        for name, (calls, left, found) in rank.items():
            times = 2 if name.startswith("full") else 1
            there = {"dispatch": times * n_moe, "combine": times * n_moe}
            assert calls == {**there, "dispatch_cached": n_moe, "combine_weights": n_moe}, name
            assert left == [0, 0, 0], f"{name}: tensors that outlive a step, an evaluation, an error"
            for key, value in expected.items():
                if shuffles(carrier):
                    torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
                else:
                    assert value.any() and torch.equal(found[key], value), f"{name}: {key}"


def shuffled_step(mode: str, shuffle: bool) -> dict[str, Tensor]:
    model = spread_model("deepep")
    checkpoint_blocks(model, mode)
    watch(Shuffled(dist.group.WORLD) if shuffle else reference("deepep", dist.group.WORLD))
    return step(model)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_rows_may_come_in_another_order_the_second_time(mode: str) -> None:
    for found, expected in zip(run_ranks(shuffled_step, 2, mode, True), in_order(), strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


def in_order() -> list[dict[str, Tensor]]:
    return run_ranks(shuffled_step, 2, "none", False)


def changed_rows() -> dict[str, str]:
    """Blocks that change, in place, what a first-party operation gave out."""
    group, found = dist.group.WORLD.group_name, {}
    x, ids, weight = torch.randn(4, 3, requires_grad=True), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)

    def dispatched(x: Tensor) -> Tensor:
        rows, _, _, _, handle = ops.DEEPEP_DISPATCH(x, ids, weight, 2, group)
        rows.detach().mul_(2)
        return ops.DEEPEP_COMBINE(rows.sin(), handle, 4, group)

    def combined(x: Tensor) -> Tensor:
        rows, _, _, _, handle = ops.HYBRIDEP_DISPATCH(x, ids, weight, 2, None, 1, group)
        home = ops.HYBRIDEP_COMBINE(rows.sin(), handle, 4, group)
        home.detach().mul_(2)
        return home.sin()

    def handled(x: Tensor) -> Tensor:
        rows, _, _, _, handle = ops.DEEPEP_DISPATCH(x, ids, weight, 2, group)
        handle[0].add_(0)
        return ops.DEEPEP_COMBINE(rows.sin(), handle, 4, group)

    blocks: list[Callable[[Tensor], Tensor]] = [dispatched, combined, handled]
    for block in blocks:
        y = checkpoint(block, x, use_reentrant=False, context_fn=default_activation_checkpoint_policy())
        with pytest.raises((RuntimeError, UserError)) as error:  # autograd's guard, or that of what is kept
            y.sum().backward()
        found[block.__name__] = str(error.value)
    return found


def test_saved_results_must_not_be_changed() -> None:
    (found,) = run_ranks(changed_rows, 1)
    assert list(found) == ["dispatched", "combined", "handled"]
    for name, message in found.items():
        assert "has been mutated" in message or "modified by an inplace operation" in message, f"{name}: {message}"
