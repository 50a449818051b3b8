"""Mixture of experts against a plain loop over tokens and experts, forward and every gradient, in every mode."""

import math
from typing import Any

import pytest
import torch
from attention_by_loops import numbers
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.balance import start_step
from core.nn.dispatch import Local, Rows
from core.nn.feed_forward import FeedForward
from core.nn.module import Flops
from core.nn.moe import Experts, MoE, Router
from core.nn.start import Constant, Normal, Scale
from core.nn.weights import parameter_count, training_flops_per_token, weights
from core.testing.activation_checkpoint import checkpoint_blocks, gradients
from core.testing.oracles import cross_entropy
from core.testing.toy import ToyMoE, on_cpu, randomise

D, E, F = 8, 6, 5

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared experts": {"shared": True},
    "biases": {"bias": True},
    "clamped": {"bias": True, "activation": "clamped_swiglu"},
    "sigmoid, groups, selection bias": {
        "shared": True,
        "router": {"score": "sigmoid", "n_groups": 3, "n_limited_groups": 2, "route_scale": 2.5, "top_k": 3}
        | {"load_balance_coeff": 0.1},
    },
    "not normalised, one expert": {"router": {"normalise": False, "top_k": 1}},
    "all experts": {"router": {"top_k": 6}},
}


def settings(*, shared: bool = False, bias: bool = False, activation: Any = "swiglu", router: Any = ()) -> MoE.Config:
    return MoE.Config(
        router=Router.Config(**{"n_experts": E, "top_k": 2, "bias": bias, **dict(router)}),
        experts=Experts.Config(hidden_dim=F, bias=bias, activation=activation),
        shared_experts=FeedForward.Config(hidden_dim=7) if shared else None,
    )


def build(config: MoE.Config) -> MoE:
    """The network with all weights drawn so wide that each matters, and a bias on its choice."""
    moe = config.build(dim=D, scale=Scale(1.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    for weight in moe.parameters():
        nn.init.normal_(weight, std=0.5, generator=generator)
    if moe.router.selection_bias is not None:
        moe.router.selection_bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.3, -0.2, 0.1]))
    return moe


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate = torch.where(gate > 7, 7.0, gate)
    up = torch.where(up > 7, 7.0, torch.where(up < -7, -7.0, up))
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


def chosen_by_loops(score_E: Tensor, config: Router.Config, bias_E: Tensor | None) -> list[int]:
    merit = (score_E if bias_E is None else score_E + bias_E).tolist()
    if config.n_groups > 1:
        size = E // config.n_groups
        groups = [merit[g * size : (g + 1) * size] for g in range(config.n_groups)]
        value = [sum(sorted(group)[-2:]) for group in groups]
        ranked = sorted(range(config.n_groups), key=lambda g: -value[g])[: config.n_limited_groups]
        merit = [m if e // size in ranked else -math.inf for e, m in enumerate(merit)]
    return sorted(range(E), key=lambda e: -merit[e])[: config.top_k]


def by_loops(moe: MoE, w: dict[str, Tensor], x_BLD: Tensor) -> Tensor:
    """Token by token, expert by expert, in the precision of the weights `w`."""

    def times(name: str, x: Tensor, expert: int | None = None) -> Tensor:
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        if expert is not None:
            weight, bias = weight[expert], None if bias is None else bias[expert]
        return weight @ x if bias is None else weight @ x + bias

    config = moe.router.config
    activation = clamped if moe.experts.config.activation == "clamped_swiglu" else swiglu
    out = []
    for x in x_BLD.flatten(0, 1):
        logits = times("router.gate", x)
        scores = 1 / (1 + (-logits).exp()) if config.score == "sigmoid" else logits.exp() / logits.exp().sum()
        chosen = chosen_by_loops(scores.detach(), config, moe.router.selection_bias)
        share = scores[chosen] / (scores[chosen].sum() if config.normalise else 1) * config.route_scale
        y = torch.zeros_like(x)
        for expert, weight in zip(chosen, share, strict=True):
            hidden = activation(times("experts.w1", x, expert), times("experts.w3", x, expert))
            y = y + weight * times("experts.w2", hidden, expert)
        if moe.shared_experts is not None:
            y = y + times("shared_experts.w2", swiglu(times("shared_experts.w1", x), times("shared_experts.w3", x)))
        out.append(y)
    return torch.stack(out).view_as(x_BLD)


def assert_equal_to_loops(moe: MoE, x_BLD: Tensor) -> None:
    """Result, also without gradients, and gradients of the input and of every weight."""
    grad_BLD = numbers(*x_BLD.shape, seed=7)
    doubles = {name: weight.detach().double().requires_grad_() for name, weight in moe.named_parameters()}
    x_leaf, x_float = x_BLD.clone().requires_grad_(), x_BLD.float().requires_grad_()
    expected = by_loops(moe, doubles, x_leaf)
    (expected * grad_BLD).sum().backward()
    out = moe(x_float)
    (out * grad_BLD.float()).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        inferred = moe.eval()(x_float.detach()).clone()
    torch.testing.assert_close(inferred.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    pairs = {name: (weight.grad, doubles[name].grad) for name, weight in moe.named_parameters()}
    for name, (found, theirs) in {**pairs, "x": (x_float.grad, x_leaf.grad)}.items():
        assert theirs is not None and found is not None, name
        error = (found.double() - theirs).norm() / theirs.norm()
        assert error < 1e-5, f"{name}: the gradient is off by {error:.1e}"


@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_equals_loops_over_tokens_and_experts(kind: dict[str, Any], shape: tuple[int, int]) -> None:
    if shape != (2, 9) and kind.get("router", {}).get("top_k") != 1:
        kind = {**kind, "router": {**kind.get("router", {}), "normalise": False}}  # or nothing depends on few logits
    assert_equal_to_loops(build(settings(**kind)), numbers(*shape, D))


@pytest.mark.parametrize("kind", ["plain", "clamped"])
def test_all_tokens_to_one_expert(kind: str) -> None:
    moe = build(settings(**KINDS[kind], router={"top_k": 1, "normalise": False, "load_balance_coeff": 0.1}))
    moe.router.selection_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0]))
    assert_equal_to_loops(moe, numbers(2, 9, D))
    assert moe.router.tokens_E.tolist() == [0, 0, 18, 0, 0, 0]


def test_idle_experts_get_gradients_of_zero() -> None:
    moe = build(settings(bias=True, router={"load_balance_coeff": 0.1}))
    moe.router.selection_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0, 8.0, 0.0]))
    moe(numbers(2, 9, D, dtype=torch.float32)).square().sum().backward()
    for name, weight in moe.experts.named_parameters():
        busy = [bool(gradient.any()) for gradient in weight.grad]
        assert busy == [True, False, False, False, True, False], name


def test_the_clamps_act_on_large_inputs() -> None:
    """Beyond 7 a gate's gradient is zero, and so is that of a linear part beyond 7 on either side."""
    moe = build(settings(**KINDS["clamped"]))
    x_BLD = 30 * numbers(2, 9, D)
    with torch.no_grad():
        gate = torch.einsum("td,efd->tef", x_BLD.flatten(0, 1).float(), moe.experts.w1.weight)
        up = torch.einsum("td,efd->tef", x_BLD.flatten(0, 1).float(), moe.experts.w3.weight)
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()
    assert_equal_to_loops(moe, x_BLD)


def test_equals_the_gpt_oss_of_transformers() -> None:
    """An implementation that is not ours, in which gates and linear parts alternate."""
    moe = build(settings(**KINDS["clamped"]))
    config = GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    theirs = GptOssMLP(config).float()
    ours = dict(moe.named_parameters())
    with torch.no_grad():
        theirs.router.weight.copy_(ours["router.gate.weight"])
        theirs.router.bias.copy_(ours["router.gate.bias"])
        for name, kind in (("w1", 0), ("w3", 1)):
            theirs.experts.gate_up_proj[:, :, kind::2] = ours[f"experts.{name}.weight"].mT
            theirs.experts.gate_up_proj_bias[:, kind::2] = ours[f"experts.{name}.bias"]
        theirs.experts.down_proj.copy_(ours["experts.w2.weight"].mT)
        theirs.experts.down_proj_bias.copy_(ours["experts.w2.bias"])
        for factor in (1.0, 30.0):
            x_BLD = factor * numbers(2, 9, D, dtype=torch.float32)
            torch.testing.assert_close(moe(x_BLD), theirs(x_BLD)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid, groups, selection bias", "clamped"])
def test_bfloat16_autocast_stays_near(kind: str) -> None:
    moe, x_BLD = build(settings(**KINDS[kind])), numbers(4, 16, D, dtype=torch.float32)
    full = moe(x_BLD)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        half = moe(x_BLD)
    assert half.dtype == full.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).norm() / full.norm() < 0.02
    half.square().sum().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in moe.parameters())


class Noting(Local):
    """Remembers in which types rows leave and come back."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, n_experts: int) -> Rows:
        self.left, self.weighed = x_TD.dtype, weight_TK.dtype
        return super().dispatch(x_TD, ids_TK, weight_TK, n_experts)

    def combine(self, y_RD: Tensor, back: tuple[Tensor, Tensor]) -> Tensor:
        self.came_back = y_RD.dtype
        return super().combine(y_RD, back)


def test_rows_travel_in_bfloat16_and_are_summed_in_float32() -> None:
    """A token's weights are those of the router, not rounded, and so are the sums of its experts' answers."""
    moe, x_BLD = build(settings(shared=True)), numbers(2, 9, D, dtype=torch.float32)
    moe.dispatcher = noting = Noting()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert moe(x_BLD).dtype == torch.float32
    assert (noting.left, noting.weighed, noting.came_back) == (torch.bfloat16, torch.float32, torch.float32)
    assert moe.bfloat16()(x_BLD.bfloat16()).dtype == torch.bfloat16
    assert (noting.left, noting.weighed, noting.came_back) == (torch.bfloat16, torch.float32, torch.float32)


def test_weights_in_bfloat16_compute_in_bfloat16() -> None:
    moe, x_BLD = build(settings(**KINDS["clamped"])), numbers(4, 16, D, dtype=torch.float32)
    full = moe(x_BLD.bfloat16().float())
    half = moe.bfloat16()(x_BLD.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - full).norm() / full.norm() < 0.03
    half.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in moe.parameters())


# -------------------------------------------------------------------------------------------- in a model, compiled


TOKENS_BL = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks a block's input
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo does, torch 2.13
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_give_the_same_gradients_and_counts(mode: str) -> None:
    found = []
    for compiled in (False, True):
        config = ToyMoE.Config(n_layers=3)
        config.moe.router.balance_loss_coeff = 0.1
        model = on_cpu(config)
        randomise(model, seed=1)
        checkpoint_blocks(model, mode)
        start_step(model, TOKENS_BL.numel())
        if compiled:
            torch._dynamo.reset()
            for block in model.layers.values():
                block.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            grads = gradients(model, lambda model=model: cross_entropy(model(TOKENS_BL), TOKENS_BL.roll(-1, dims=1)))
        counted = {name: value.clone() for name, value in model.named_buffers() if "router" in name}
        found.append((grads, counted))
    torch._dynamo.reset()
    (eager, expected), (compiled_grads, counted) = found
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled_grads[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert expected["layers.1.moe.router.tokens_E"].sum() == 2 * TOKENS_BL.numel() * 2
    assert expected["layers.1.moe.router.balance_loss"] > 0
    for name, value in expected.items():
        torch.testing.assert_close(counted[name], value, rtol=1e-5, atol=0, msg=name)


def test_forced_balance_deals_tokens_in_turn() -> None:
    """Each expert gets every third of 18 x 2 places, and the answer is still weighted by the router's scores."""
    moe = build(settings())
    moe.router.force_balance = True
    x_BLD = numbers(2, 9, D, dtype=torch.float32)
    out = moe(x_BLD)
    assert moe.router.tokens_E.tolist() == [6] * E
    token = x_BLD[0, 4].double()  # places 8 and 9: experts 2 and 3
    w = {name: weight.double() for name, weight in moe.named_parameters()}
    scores = (w["router.gate.weight"] @ token).softmax(-1)
    expected = sum(
        scores[e]
        / (scores[2] + scores[3])
        * (w["experts.w2.weight"][e] @ swiglu(w["experts.w1.weight"][e] @ token, w["experts.w3.weight"][e] @ token))
        for e in (2, 3)
    )
    torch.testing.assert_close(out[0, 4].double(), expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- settings


def test_weights_by_hand() -> None:
    moe = settings(bias=True, shared=True).build(dim=D, scale=Scale(0.3, 0.1))
    wide, narrow, zero = Normal(0.3), Normal(0.1), Constant(0.0)
    into, out_of = ("experts", "expert_ffn", "embed"), ("experts", "embed", "expert_ffn")
    assert {name: (tuple(value.shape), axes, start) for name, value, axes, start in weights(moe)} == {
        "router.gate.weight": ((E, D), ("choices", "embed"), wide),
        "router.gate.bias": ((E,), ("choices",), zero),
        "experts.w1.weight": ((E, F, D), into, wide),
        "experts.w1.bias": ((E, F), into[:2], zero),
        "experts.w3.weight": ((E, F, D), into, wide),
        "experts.w3.bias": ((E, F), into[:2], zero),
        "experts.w2.weight": ((E, D, F), out_of, narrow),
        "experts.w2.bias": ((E, D), out_of[:2], zero),
        "shared_experts.w1.weight": ((7, D), ("ffn", "embed"), wide),
        "shared_experts.w3.weight": ((7, D), ("ffn", "embed"), wide),
        "shared_experts.w2.weight": ((D, 7), ("embed", "ffn"), narrow),
    }
    assert parameter_count(moe) == E * (D + 1) + E * (3 * D * F + 2 * F + D) + 3 * 7 * D


@pytest.mark.parametrize("top_k", [1, 4])
def test_flops_are_those_of_the_experts_that_a_token_chooses(top_k: int) -> None:
    moe = settings(bias=True, shared=True, router={"top_k": top_k}).build(dim=D, scale=Scale(0.3, 0.1))
    assert training_flops_per_token(moe, 100) == Flops(3 * 2 * (E * D + top_k * 3 * D * F + 3 * 7 * D))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 0}, "experts.hidden_dim: hidden_dim 0 must be at least 1"),
        ({"activation": "gelu"}, "experts.activation: expected 'swiglu' or 'clamped_swiglu', got 'gelu'"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    config = settings()
    validate(config)
    config.experts = Experts.Config(**{"hidden_dim": 5, **change})
    with pytest.raises(UserError, match=message):
        validate(config)
