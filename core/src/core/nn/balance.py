"""The load of the experts over one step: counted by the routers, read here, and held even by their bias.

Left alone, a router sends more tokens to the experts that are already better, until a few get all of them. Two forces
work against that, and a recipe may use either or both:

* The bias (`load_balance_coeff`; arXiv:2408.15664) is added to the scores where experts are chosen, and nowhere else:
  it changes who computes a token, not the weight of the result, and so no gradient. After each update the bias of an
  expert with more than the mean load falls by one step, that of one with less rises by one.
* The balance loss (`balance_loss_coeff`; arXiv:2412.19437, equations 17 to 20) is, per row, the coefficient times the
  sum over experts of f P: f is the expert's share of the row's choices times the number of experts, P its mean
  normalised score. It equals the coefficient when both are even, and is larger when the experts that are chosen most
  also score most. f is a count without a gradient; the gradient goes through P, and lowers the scores of those that are
  chosen most. It joins that of the scores in backward, so that a block returns nothing but its output, and it has the
  denominator of the main loss: the valid tokens of the whole step.

Counts are of a whole step: of all microbatches, summed over all ranks that read different tokens, each token once even
where checkpointing repeats its forward. `debug.moe_force_load_balance` deals tokens out in turn instead, to measure
speed without an effect of routing.
"""

from typing import NamedTuple

import torch
from torch import nn

from core.config.errors import UserError
from core.nn.moe import Router


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router of a model by the name of its module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def equal_balance_coeff(coeff: float, *, top_k: int, n_layers: int) -> float:
    """The coefficient of our balance loss that is as strong as transformers' with `coeff`.

    `load_balancing_loss_func` there multiplies, over all tokens and blocks at once, E, the share of tokens that chose
    an expert and its mean probability: at even loads K. Ours is one at even loads, in each of L blocks: K / L as much.
    """
    return coeff * top_k / n_layers


def start_step(model: nn.Module, n_valid: float) -> None:
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
        coeff = router.config.load_balance_coeff
        if router.selection_bias is not None and coeff is not None:
            load_E = router.tokens_E
            step_E = (load_E.sum() - load_E * len(load_E)).sign().float()  # in whole numbers, alike on every device
            router.selection_bias += coeff * (step_E - step_E.mean())


def check_routers(model: nn.Module) -> None:
    """Raise `UserError` when balance is to be forced on a whole model without any; a stage of one may have none."""
    if not routers(model):
        raise UserError("debug.moe_force_load_balance is set, and the model has no router: leave it off")


def force_balance(model: nn.Module) -> None:
    """Let every router of a model, or of a stage of one, deal out tokens in turn, whatever their scores."""
    for router in routers(model).values():
        router.force_balance = True


class Load(NamedTuple):
    """How evenly the experts of one layer were loaded in a step: 1 when all got the same, and how many got nothing."""

    max_over_mean: float
    dead_experts: int


def layer_loads(model: nn.Module) -> dict[str, Load]:
    """The load of every layer of `model` in the last step, by the name of the layer, in one reading of the device."""
    found = {name.removesuffix(".moe.router"): router.tokens_E.double() for name, router in routers(model).items()}
    rows = [torch.stack((load_E.max() / load_E.mean(), (load_E == 0).double().sum())) for load_E in found.values()]
    read = torch.stack(rows).tolist() if rows else []
    return {name: Load(worst, int(dead)) for name, (worst, dead) in zip(found, read, strict=True)}


def balance_loss(model: nn.Module) -> float:
    """The balance losses of the last step, in nats per valid token; of several ranks they add up."""
    return float(sum(router.balance_loss * router.loss_scale for router in routers(model).values()))


def load_metrics(loads: dict[str, Load], balance: float) -> dict[str, float]:
    """The loads of all layers as metrics, by layer and for all (the worst; the sum of experts without a token), and the
    balance loss if there is one."""
    if not loads:
        return {}
    metrics: dict[str, float] = {}
    for layer, load in loads.items():
        metrics[f"moe/{layer}/max_over_mean_load"] = load.max_over_mean
        metrics[f"moe/{layer}/dead_experts"] = load.dead_experts
    metrics["moe/max_over_mean_load"] = max(load.max_over_mean for load in loads.values())
    metrics["moe/dead_experts"] = sum(load.dead_experts for load in loads.values())
    if balance > 0:
        metrics["moe/balance_loss"] = balance
    return metrics
