"""The router against a plain loop over tokens, experts and groups; counted once, chosen once, fp32 always."""

import math
from typing import Any

import pytest
import torch
from attention_by_loops import numbers
from torch import Tensor, nn

import core.nn.moe
from core.activation_checkpoint.region import is_recomputing
from core.config.errors import UserError
from core.config.validate import validate
from core.nn.balance import routers, start_step
from core.nn.module import Flops
from core.nn.moe import Choice, Router
from core.nn.start import Constant, Normal, Scale
from core.nn.weights import training_flops_per_token, weights
from core.testing.activation_checkpoint import checkpoint_blocks, gradients
from core.testing.oracles import cross_entropy
from core.testing.toy import ToyMoE, on_cpu, randomise

E = 6


def build(dim: int = E, **changes: Any) -> Router:
    """A router whose logits are its input, unless `dim` is another width."""
    router = Router.Config(**{"n_experts": E, "top_k": 2, **changes}).build(dim=dim, scale=Scale(1.0, 1.0))
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(E) if dim == E else numbers(router.config.n_experts, dim))
        if router.gate.bias is not None:
            router.gate.bias.zero_()
    return router


def choose_by_loops(logits: list[float], config: Router.Config, bias: list[float]) -> tuple[list[int], list[float]]:
    """The experts that one token chooses, the best first, and the weights of their answers."""
    if config.score == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]
    merit = {e: scores[e] + bias[e] for e in range(len(logits))}
    size = len(logits) // config.n_groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(config.n_groups)]
    if config.n_groups > 1:
        n_best = 2 if config.group_score == "sum_of_two" else 1
        value = [sum(sorted((merit[e] for e in group), reverse=True)[:n_best]) for group in members]
        ranked = sorted(range(config.n_groups), key=lambda group: (-value[group], group))
        allowed = {e for group in ranked[: config.n_limited_groups] for e in members[group]}
        merit = {e: merit[e] for e in allowed}
    chosen = sorted(merit, key=lambda e: (-merit[e], e))[: config.top_k]
    weights = [scores[e] for e in chosen]
    if config.normalise:
        weights = [weight / sum(scores[e] for e in chosen) for weight in weights]
    return chosen, [weight * config.route_scale for weight in weights]


SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, not normalised": {"normalise": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, not normalised, scaled": {"score": "sigmoid", "normalise": False, "route_scale": 2.5},
    "scaled": {"route_scale": 16.0, "top_k": 3},
    "one expert": {"top_k": 1},
    "all experts": {"top_k": 6},
    "groups": {"n_groups": 3, "n_limited_groups": 2, "top_k": 3},
    "best of groups": {"n_groups": 3, "n_limited_groups": 1, "group_score": "max", "score": "sigmoid"},
    "groups of one": {"n_groups": 6, "n_limited_groups": 3, "group_score": "max"},
    "all groups": {"n_groups": 2, "n_limited_groups": 2, "top_k": 4},
    "bias": {"load_balance_coeff": 0.1, "score": "sigmoid"},
    "bias and groups": {"load_balance_coeff": 0.1, "n_groups": 2, "n_limited_groups": 1, "score": "sigmoid"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_choices_and_weights_equal_loops(settings: dict[str, Any]) -> None:
    router = build(**settings).eval()
    bias = [0.0] * E
    if router.selection_bias is not None:
        router.selection_bias.copy_(torch.tensor(bias := [0.4, -0.3, 0.2, 0.0, -0.5, 0.1]))
    x_BLD = 2 * numbers(3, 7, E, dtype=torch.float32)
    choice = router(x_BLD)
    assert choice.ids_TK.shape == choice.weight_TK.shape == (21, router.config.top_k)
    assert choice.ids_TK.dtype == torch.int64 and choice.weight_TK.dtype == torch.float32
    for logits, ids, weights_K in zip(x_BLD.flatten(0, 1).tolist(), *choice, strict=True):
        expected_ids, expected_weights = choose_by_loops(logits, router.config, bias)
        assert ids.tolist() == expected_ids
        assert weights_K.tolist() == pytest.approx(expected_weights, rel=1e-5)


def test_bias_changes_choices_and_no_weight() -> None:
    plain, biased = build(score="sigmoid").eval(), build(score="sigmoid", load_balance_coeff=1.0).eval()
    biased.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 5.0]))
    x_BLD = numbers(1, 20, E, dtype=torch.float32)
    first, second = plain(x_BLD), biased(x_BLD)
    assert (first.ids_TK != second.ids_TK).any() and (second.ids_TK[:, 0] == 5).all()
    scores_TE = x_BLD[0].sigmoid()
    chosen_TK = scores_TE.gather(1, second.ids_TK)
    torch.testing.assert_close(second.weight_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True))


def test_experts_of_other_groups_never_come_in() -> None:
    """Not even when a bias has made all that are allowed worse than nothing."""
    router = build(n_groups=2, n_limited_groups=1, top_k=3, score="sigmoid", load_balance_coeff=0.1).eval()
    router.selection_bias.fill_(-2.0)
    x_BLD = numbers(1, 20, E, dtype=torch.float32)
    expected = [choose_by_loops(logits, router.config, [-2.0] * E)[0] for logits in x_BLD[0].tolist()]
    assert router(x_BLD).ids_TK.tolist() == expected


def test_scores_of_zero_give_weights_of_zero() -> None:
    """A sigmoid far below its middle is nothing in fp32; divided by their sum such scores must not become NaN."""
    router = build(score="sigmoid", route_scale=2.5).eval()
    weight_TK = router(torch.full((1, 3, E), -1e3)).weight_TK
    weight_TK.sum().backward()
    assert weight_TK.tolist() == [[0.0, 0.0]] * 3 and router.gate.weight.grad.isfinite().all()


def test_logits_have_a_bias() -> None:
    router = build(bias=True).eval()
    router.gate.bias.data.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 8.0, 0.0]))
    choice = router(torch.zeros(1, 1, E))
    assert choice.ids_TK.tolist() == [[2, 4]]
    assert choice.weight_TK[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])


@pytest.mark.parametrize(
    ("logits", "settings", "expected"),
    [
        ([0.0] * 6, {"top_k": 3}, [0, 1, 2]),
        ([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], {"top_k": 3}, [1, 2, 4]),
        ([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], {"top_k": 5}, [1, 2, 4, 5, 0]),
        ([0.0] * 6, {"top_k": 2, "n_groups": 3, "n_limited_groups": 1}, [0, 1]),
        ([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], {"top_k": 2, "n_groups": 3, "n_limited_groups": 1}, [2, 3]),
        ([0.0, 1.0, 1.0, 1.0, 0.0, 1.0], {"top_k": 3, "n_groups": 3, "n_limited_groups": 2}, [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_of_equal_ones_the_lower_number_wins(
    logits: list[float], settings: dict[str, Any], expected: list[int], score: str
) -> None:
    router = build(score=score, **settings).eval()
    choice = router(torch.tensor(logits).expand(2, 3, E))
    assert choice.ids_TK.tolist() == [expected] * 6


def test_many_equal_scores_keep_their_order() -> None:
    """Sorting algorithms that keep short rows in order may break long ones."""
    router = Router.Config(n_experts=512, top_k=40).build(dim=4, scale=Scale(1.0, 1.0)).eval()
    router.gate.weight.data.zero_()
    assert router(numbers(1, 3, 4, dtype=torch.float32)).ids_TK.tolist() == [list(range(40))] * 3


def test_forced_balance_deals_in_turn() -> None:
    router = build(top_k=4)
    router.force_balance = True
    choice = router(numbers(2, 3, E, dtype=torch.float32))
    assert choice.ids_TK.flatten().tolist() == [place % E for place in range(24)]
    assert router.tokens_E.tolist() == [4] * 6
    torch.testing.assert_close(choice.weight_TK.sum(-1), torch.ones(6))


def test_gradient_reaches_the_gate_through_the_weights() -> None:
    """Of normalised softmax over two chosen ones: the derivative of a sigmoid."""
    router = build().eval()
    x_BLD = torch.tensor([[[3.0, 0.0, 2.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    router(x_BLD).weight_TK[0, 0].backward()
    share = 1 / (1 + math.exp(-1.0))
    slope = share * (1 - share)
    assert x_BLD.grad[0, 0].tolist() == pytest.approx([slope, 0, -slope, 0, 0, 0], abs=1e-6)
    expected = [[3 * slope, 0, 2 * slope], [-3 * slope, 0, -2 * slope]]
    assert router.gate.weight.grad[0, :3].tolist() == pytest.approx(expected[0], abs=1e-6)
    assert router.gate.weight.grad[2, :3].tolist() == pytest.approx(expected[1], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ fp32


def close_calls() -> Tensor:
    """Logits that bfloat16 cannot tell apart."""
    return 1.0 + 1e-4 * numbers(1, 50, E, dtype=torch.float32)


def test_autocast_does_not_blur_the_choice() -> None:
    router, x_BLD = build(), close_calls()
    expected = router(x_BLD)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x_BLD)
    assert found.weight_TK.dtype == torch.float32
    assert torch.equal(found.ids_TK, expected.ids_TK) and torch.equal(found.weight_TK, expected.weight_TK)
    assert not torch.equal(router(x_BLD.bfloat16().float()).ids_TK, expected.ids_TK), "these are no close calls"


def test_weights_in_bfloat16_compute_in_float32() -> None:
    router = build(dim=16, bias=True)
    router.gate.bias.data.copy_(numbers(E, seed=4))
    half = build(dim=16, bias=True)
    for ours, theirs in zip(half.gate.parameters(), router.gate.parameters(), strict=True):
        ours.data = theirs.data.bfloat16()
        theirs.data = theirs.data.bfloat16().float()
    x_BLD = numbers(1, 50, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = half(x_BLD)
    expected = router(x_BLD.float())
    assert found.weight_TK.dtype == torch.float32
    assert torch.equal(found.ids_TK, expected.ids_TK) and torch.equal(found.weight_TK, expected.weight_TK)


# ------------------------------------------------------------------------- chosen once, counted once: checkpointing


TOKENS_BL = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def toy(mode: str, **changes: Any) -> ToyMoE:
    config = ToyMoE.Config(n_layers=3)
    for name, value in changes.items():
        setattr(config.moe.router, name, value)
    model = on_cpu(config)
    randomise(model, seed=1)
    checkpoint_blocks(model, mode)
    start_step(model, TOKENS_BL.numel())
    assert isinstance(model, ToyMoE)
    return model


def toy_gradients(model: ToyMoE) -> dict[str, Tensor]:
    return gradients(model, lambda: cross_entropy(model(TOKENS_BL), TOKENS_BL.roll(-1, dims=1)))


@pytest.mark.parametrize("changes", [{}, {"n_groups": 3, "n_limited_groups": 2}], ids=["plain", "groups"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_does_not_choose_again(
    mode: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the sort to fall differently the second time, the gradient would still be that of the first choice."""
    expected = toy_gradients(toy("none", **changes))
    repeated = []

    def worst_again(score: Tensor, k: int) -> Tensor:
        """The best ones, and in a repetition, by the same operations, the worst ones."""
        repeated.append(is_recomputing())
        sign = -1.0 if is_recomputing() else 1.0
        return (score * sign).sort(dim=-1, descending=True, stable=True).indices[..., :k]

    monkeypatch.setattr(core.nn.moe, "best", worst_again)
    found = toy_gradients(toy(mode, **changes))
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert any(repeated), "this test sees nothing: the choice was not even tried again"


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_counted_once_and_summed_over_the_step(mode: str) -> None:
    model = toy(mode)
    seen: dict[str, list[Choice]] = {name: [] for name in routers(model)}

    def note(name: str, choice: Choice) -> None:
        if not is_recomputing():
            seen[name].append(choice)

    for name, router in routers(model).items():
        router.register_forward_hook(lambda module, given, out, name=name: note(name, out))
    for _ in range(3):  # three microbatches
        toy_gradients(model)
    assert seen.keys() == {"layers.1.moe.router", "layers.2.moe.router"}
    for name, router in routers(model).items():
        chosen = torch.cat([out.ids_TK.flatten() for out in seen[name]]).tolist()
        assert router.tokens_E.tolist() == [chosen.count(expert) for expert in range(E)]
        assert router.tokens_E.sum() == 3 * TOKENS_BL.numel() * 2
    start_step(model, 5)
    assert all(not router.tokens_E.any() for router in routers(model).values())


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_evaluation_counts_nothing(mode: str) -> None:
    model = toy(mode, balance_loss_coeff=0.1).eval()
    with torch.no_grad():
        model(TOKENS_BL)
    toy_gradients(model)
    for router in routers(model).values():
        assert not router.tokens_E.any() and not router.balance_loss


def test_the_choice_alone_is_kept() -> None:
    """Not the order of all experts that it was the beginning of."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    router = Router.Config(n_experts=64, top_k=2).build(dim=4, scale=Scale(1.0, 1.0))
    nn.init.normal_(router.gate.weight)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        router(numbers(1, 8, 4, dtype=torch.float32))
    ids = [tensor for tensor in kept if tensor.dtype == torch.int64]
    assert ids and all(tensor.untyped_storage().nbytes() == 8 * 2 * 8 for tensor in ids)


# --------------------------------------------------------------------------------------------------------- settings


def test_weights_and_flops() -> None:
    router = Router.Config(n_experts=5, top_k=2, bias=True, load_balance_coeff=0.1).build(dim=7, scale=Scale(0.3, 0.1))
    assert {name: (tuple(value.shape), axes, start) for name, value, axes, start in weights(router)} == {
        "gate.weight": ((5, 7), ("choices", "embed"), Normal(0.3)),
        "gate.bias": ((5,), ("choices",), Constant(0.0)),
    }
    assert training_flops_per_token(router, 100) == Flops(3 * 2 * 5 * 7)
    assert router.state_dict().keys() == {"gate.weight", "gate.bias", "selection_bias"}
    assert router.selection_bias.dtype == torch.float32 and not router.selection_bias.any()
    plain = Router.Config(n_experts=5, top_k=2).build(dim=7, scale=Scale(0.3, 0.1))
    assert plain.state_dict().keys() == {"gate.weight"} and plain.selection_bias is None
    assert isinstance(plain(torch.zeros(1, 1, 7)), Choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 0}, "n_experts: n_experts 0 must be at least 1"),
        ({"top_k": 0}, "top_k: top_k 0 must be from 1 to n_experts 8"),
        ({"top_k": 9}, "top_k: top_k 9 must be from 1 to n_experts 8"),
        ({"n_groups": 3}, "n_groups: n_groups 3 must divide n_experts 8: use 1, 2, 4, 8"),
        ({"n_groups": 0}, "n_groups: n_groups 0 must divide n_experts 8"),
        ({"n_groups": 4, "n_limited_groups": 5}, "n_limited_groups: n_limited_groups 5 must be from 1 to n_groups 4"),
        ({"n_limited_groups": 2}, "n_limited_groups: n_limited_groups 2 must be from 1 to n_groups 1"),
        ({"n_groups": 4, "n_limited_groups": 0}, "n_limited_groups 0 must be from 1 to n_groups 4"),
        (
            {"n_groups": 4, "n_limited_groups": 1, "top_k": 3},
            "n_limited_groups 1 of 2 experts each leave 2, top_k is 3: raise n_limited_groups or lower top_k",
        ),
        (
            {"n_groups": 8, "n_limited_groups": 4},
            "n_groups 8 leaves 1 expert in a group, whose two best .*: use at most 4 groups, or group_score max",
        ),
        ({"load_balance_coeff": 0.0}, "load_balance_coeff: load_balance_coeff 0.0 must be above 0, or None"),
        ({"load_balance_coeff": math.nan}, "load_balance_coeff: load_balance_coeff nan must be above 0"),
        ({"balance_loss_coeff": -0.1}, "balance_loss_coeff: balance_loss_coeff -0.1 must not be negative"),
        ({"balance_loss_coeff": math.nan}, "balance_loss_coeff: balance_loss_coeff nan must not"),
        ({"score": "tanh"}, "score: expected 'softmax' or 'sigmoid', got 'tanh'"),
        ({"route_scale": 0.0}, "route_scale: route_scale 0.0 must be above 0"),
        ({"route_scale": math.nan}, "route_scale: route_scale nan must be above 0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    validate(Router.Config(n_experts=8, top_k=2))
    with pytest.raises(UserError, match=message):
        validate(Router.Config(**{"n_experts": 8, "top_k": 2, **change}))
