"""What keeps experts evenly loaded, and what says how they are: by hand."""

import pytest
import torch
from torch import Tensor

from core.config.errors import UserError
from core.nn.balance import (
    balance_loss,
    check_routers,
    force_balance,
    layer_loads,
    load_metrics,
    routers,
    start_step,
    update_selection_bias,
)
from core.nn.module import Module
from core.nn.moe import Router
from core.nn.start import Scale
from core.testing.toy import Toy, ToyMoE, on_cpu


def toy(n_layers: int = 3, **changes: object) -> ToyMoE:
    config = ToyMoE.Config(n_layers=n_layers)
    for name, value in changes.items():
        setattr(config.moe.router, name, value)
    model = on_cpu(config)
    assert isinstance(model, ToyMoE)
    return model


def loaded(model: Module, *loads: list[int]) -> list[Router]:
    """The routers of a model, after they counted so many tokens for each expert."""
    found = list(routers(model).values())
    for router, load in zip(found, loads, strict=True):
        router.tokens_E.copy_(torch.tensor(load))
    return found


def test_routers_are_found_by_name() -> None:
    assert list(routers(toy())) == ["layers.1.moe.router", "layers.2.moe.router"]
    assert routers(on_cpu(Toy.Config())) == {}


def test_a_step_starts_from_nothing() -> None:
    model = toy()
    first, second = loaded(model, [1, 2, 3, 4, 5, 6], [9] * 6)
    first.balance_loss.fill_(3.0)
    start_step(model, 40)
    for router in (first, second):
        assert router.tokens_E.tolist() == [0] * 6 and router.balance_loss == 0
        assert router.loss_scale.item() == pytest.approx(1 / 40)


def test_bias_moves_against_the_load_by_hand() -> None:
    """A mean of 4; above, below, ..., equal: signs -, +, -, 0, +, + with mean 1/6."""
    model = toy(load_balance_coeff=0.5)
    first, second = loaded(model, [9, 0, 8, 4, 1, 2], [5] * 6)
    first.selection_bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    second.selection_bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    update_selection_bias(model)
    moves = [0.5 * (sign - 1 / 6) for sign in (-1, 1, -1, 0, 1, 1)]
    expected = [start + move for start, move in zip(range(1, 7), moves, strict=True)]
    assert first.selection_bias.tolist() == pytest.approx(expected)
    assert first.selection_bias.sum().item() == pytest.approx(21)
    assert second.selection_bias.tolist() == [1, 2, 3, 4, 5, 6], "an even load moves nothing"
    assert first.tokens_E.tolist() == [9, 0, 8, 4, 1, 2], "metrics read the counts after the update"


def test_large_counts_are_told_apart() -> None:
    """Beyond 2^24 fp32 does not know odd numbers."""
    model = toy(n_layers=2, load_balance_coeff=1.0)
    (router,) = loaded(model, [2**24 + 1, 2**24 - 1, 2**24, 2**24, 2**24, 2**24])
    update_selection_bias(model)
    assert router.selection_bias.tolist() == [-1, 1, 0, 0, 0, 0]


def test_no_coefficient_no_bias() -> None:
    model = toy(n_layers=2, load_balance_coeff=None)
    (router,) = loaded(model, [9, 0, 8, 4, 1, 2])
    update_selection_bias(model)
    assert router.selection_bias is None and "selection_bias" not in str(model.state_dict().keys())


def test_a_layer_without_bias_keeps_no_other_from_its_step() -> None:
    model = toy(load_balance_coeff=0.5)
    first, second = loaded(model, [9, 0, 8, 4, 1, 2], [0, 4, 1, 1, 3, 3])
    first.selection_bias = None
    update_selection_bias(model)
    assert second.selection_bias.tolist() == [0.5, -0.5, 0.5, 0.5, -0.5, -0.5]


def test_steps_even_out_a_crooked_router() -> None:
    """A gate that loves one expert: the bias alone brings all experts to work, and stops them from resting again."""
    model = toy(n_layers=2, load_balance_coeff=0.01, top_k=2)
    (router,) = routers(model).values()
    torch.nn.init.normal_(router.gate.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    router.gate.weight.data[3, 0] = 2.0
    x_BLD = torch.rand(4, 64, 16, generator=torch.Generator().manual_seed(0))
    worst = []
    for _ in range(80):
        start_step(model, x_BLD.shape[0] * x_BLD.shape[1])
        router(x_BLD)
        worst.append((router.tokens_E.max() / router.tokens_E.float().mean()).item())
        update_selection_bias(model)
    assert worst[0] > 2.9 and max(worst[-10:]) < 2.0


def values(model: Module) -> dict[str, float]:
    return load_metrics(layer_loads(model), balance_loss(model))


def test_metrics_by_hand() -> None:
    model = toy()
    loaded(model, [6, 0, 0, 2, 2, 2], [1, 3, 2, 0, 0, 0])
    assert values(model) == {
        "moe/layers.1/max_over_mean_load": 3.0,
        "moe/layers.1/dead_experts": 2,
        "moe/layers.2/max_over_mean_load": 3.0,
        "moe/layers.2/dead_experts": 3,
        "moe/max_over_mean_load": 3.0,
        "moe/dead_experts": 5,
    }
    loaded(model, [2] * 6, [3, 3, 3, 1, 1, 1])
    assert values(model)["moe/max_over_mean_load"] == values(model)["moe/layers.2/max_over_mean_load"] == 1.5
    assert values(model)["moe/layers.1/max_over_mean_load"] == 1 and values(model)["moe/dead_experts"] == 0


def test_balance_loss_is_reported_per_valid_token() -> None:
    model = toy(balance_loss_coeff=0.1)
    start_step(model, 40)
    first, second = loaded(model, [2] * 6, [2] * 6)
    first.balance_loss.fill_(6.0)
    second.balance_loss.fill_(2.0)
    assert values(model)["moe/balance_loss"] == pytest.approx(8 / 40)


def test_a_dense_model_has_no_load() -> None:
    model = on_cpu(Toy.Config())
    assert values(model) == {}
    start_step(model, 40)
    update_selection_bias(model)
    with pytest.raises(UserError, match="moe_force_load_balance is set, and the model has no router: leave it off"):
        check_routers(model)


def test_a_dense_stage_of_a_pipeline_has_nothing_to_force() -> None:
    """The whole model is asked for routers, before it is cut."""
    model = toy(n_layers=2)
    check_routers(model)
    del model.layers["1"]
    force_balance(model)
    assert routers(model) == {}


def test_forced_balance_reaches_every_router() -> None:
    model = toy()
    force_balance(model)
    start_step(model, 24)
    model(torch.zeros(2, 12, dtype=torch.int64))  # 48 choices
    assert [router.tokens_E.tolist() for router in routers(model).values()] == [[8] * 6] * 2
    assert values(model)["moe/max_over_mean_load"] == 1 and values(model)["moe/dead_experts"] == 0


# ---------------------------------------------------------------------------------------------------- balance loss


def balance_loss_by_loops(score_BLE: Tensor, ids_BLK: Tensor, coeff: float) -> Tensor:
    """Equations 17 to 20 of arXiv:2412.19437 for each row, times its length, summed over rows."""
    n_rows, length, n_experts = score_BLE.shape
    top_k = ids_BLK.shape[-1]
    total = torch.zeros((), dtype=score_BLE.dtype)
    for row in range(n_rows):
        for expert in range(n_experts):
            chose = sum(expert in ids.tolist() for ids in ids_BLK[row])
            f = n_experts / (top_k * length) * chose
            p = sum(score_BLE[row, t, expert] / score_BLE[row, t].sum() for t in range(length)) / length
            total = total + coeff * length * f * p
    return total


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "biased, in groups"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_and_its_gradient_equal_loops(score: str, grouped: bool) -> None:
    """Alone, because what comes out of the router takes no part in the loss."""
    config = Router.Config(n_experts=6, top_k=2, score=score, balance_loss_coeff=0.3)
    if grouped:
        config.n_groups, config.n_limited_groups, config.load_balance_coeff = 3, 2, 0.1
    router = config.build(dim=4, scale=Scale(1.0, 1.0))
    if router.selection_bias is not None:
        router.selection_bias.copy_(torch.tensor([0.5, 0.0, 0.0, 0.3, 0.0, 0.0]))
    router.loss_scale.fill_(1 / 40)
    x_BLD = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(1))
    choice = router(x_BLD)
    (choice.weight_TK.sum() * 0).backward()
    weight = router.gate.weight.detach().double().requires_grad_()
    logits_BLE = x_BLD.double() @ weight.T
    score_BLE = logits_BLE.sigmoid() if score == "sigmoid" else logits_BLE.softmax(-1)
    expected = balance_loss_by_loops(score_BLE, choice.ids_TK.view(3, 5, 2), 0.3)
    (expected / 40).backward()
    assert router.balance_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(router.gate.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-8)


def test_an_even_load_has_the_least_balance_loss() -> None:
    """With even scores f P sums to 1: the loss is coeff times the number of tokens."""
    router = Router.Config(n_experts=6, top_k=2, balance_loss_coeff=0.3).build(dim=4, scale=Scale(1.0, 1.0))
    router.gate.weight.data.zero_()
    router(torch.zeros(3, 5, 4))
    assert router.balance_loss.item() == pytest.approx(0.3 * 15)


def test_padding_is_not_counted_and_has_no_balance_loss() -> None:
    """A row that ends in padding counts as its beginning alone does, and one that is nothing else as nothing."""
    lengths, x_BLD = (5, 3, 0), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    padding_BL = torch.arange(5) >= torch.tensor(lengths)[:, None]
    found = []
    for padded in (True, False):
        router = Router.Config(n_experts=6, top_k=2, balance_loss_coeff=0.3).build(dim=4, scale=Scale(1.0, 1.0))
        torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(1))
        router.loss_scale.fill_(1 / 8)
        parts = [(x_BLD, padding_BL)] if padded else [(x_BLD[i : i + 1, :n],) for i, n in enumerate(lengths) if n]
        sum(router(*part).weight_TK.sum() * 0 for part in parts).backward()
        found.append((router.tokens_E.tolist(), router.balance_loss.item(), router.gate.weight.grad))
    assert found[0][0] == found[1][0] and sum(found[0][0]) == 2 * sum(lengths)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2])
