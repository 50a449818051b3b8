"""The load of the experts over one step: counted by the routers, read here, and held even by their bias."""

from collections.abc import Iterator

import torch
from torch import nn

from core.config.errors import UserError
from core.nn.moe import Router


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router of a model by the name of its module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def start_step(model: nn.Module, n_valid: int) -> None:
    """Forget what was counted, and give balance losses the denominator of a step of `n_valid` tokens."""
    for router in routers(model).values():
        router.tokens_E.zero_()
        router.balance_loss.zero_()
        router.loss_scale.fill_(1 / n_valid)


@torch.no_grad()
def update_selection_bias(model: nn.Module) -> None:
    """Make overloaded experts less likely and idle ones more, by one step of each router's coefficient.

    bias += coeff (s - mean s), s being the sign of the mean load less the expert's (arXiv:2408.15664, algorithm 1);
    without its mean the step leaves the bias' sum where it is. To be called once per update of the weights.
    """
    for router in routers(model).values():
        if router.selection_bias is not None:
            load_E = router.tokens_E
            step_E = (load_E.sum() - load_E * len(load_E)).sign().float()  # in whole numbers, alike on every device
            router.selection_bias += router.config.load_balance_coeff * (step_E - step_E.mean())


def force_balance(model: nn.Module) -> None:
    """Let every router deal out tokens in turn, whatever their scores. Raises `UserError` when there is none."""
    found = routers(model)
    if not found:
        raise UserError("debug.moe_force_load_balance is set, and the model has no router: leave it off")
    for router in found.values():
        router.force_balance = True


def load_metrics(model: nn.Module) -> Iterator[tuple[str, float]]:
    """How the last step loaded the experts, as (name, value): for each layer and for all of them.

    max_over_mean_load is 1 when all experts got the same number of tokens (of all layers: the worst);
    dead_experts counts those that got none (of all layers: the sum); balance_loss is nats per valid token.
    """
    found = routers(model)
    if not found:
        return
    worst, dead = 0.0, 0
    for name, router in found.items():
        load_E = router.tokens_E.double()
        layer = name.removesuffix(".moe.router")
        of_layer = (load_E.max() / load_E.mean()).item()
        idle = int((load_E == 0).sum())
        yield f"moe/{layer}/max_over_mean_load", of_layer
        yield f"moe/{layer}/dead_experts", idle
        worst, dead = max(worst, of_layer), dead + idle
    yield "moe/max_over_mean_load", worst
    yield "moe/dead_experts", dead
    if any(router.config.balance_loss_coeff > 0 for router in found.values()):
        losses = [router.balance_loss * router.loss_scale for router in found.values()]
        yield "moe/balance_loss", torch.stack(losses).sum().item()
