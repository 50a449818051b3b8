"""The optimizer against PyTorch's own classes, bit for bit, and which weights it shrinks or leaves alone."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.start import Constant
from core.nn.weights import Weight
from core.nn.weights import weights as weights_of
from core.optim.adam import Adam, AdamW, TwoMoments
from core.optim.optimizer import Optimizer
from core.parallel.layout import SingleRank
from core.runtime.meta import meta_model
from core.step.checks import check_optimizer
from core.testing.toy import Toy, ToyMoE

SHAPES = {
    "embed.weight": (7, 5),
    "attention_norm.weight": (5,),
    "w1.weight": (33, 5),
    "w1.bias": (33,),
    "norm.weight": (5,),
    "scalar": (),
}
DECAYED = {"embed.weight", "w1.weight", "scalar"}
PEAK, FACTORS = 2e-2, [0.5, 0.15, 0.0, 1.0, 0.05]


def some_weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in SHAPES.items()}


def built(config: Optimizer.Config, weights: dict[str, nn.Parameter]) -> Any:
    """The optimizer of these weights on one rank."""
    named = [Weight(name, value, ("embed",) * value.dim(), Constant(0.0)) for name, value in weights.items()]
    return config.build(weights=named, layout=SingleRank(torch.device("cpu")))


def set_gradients(weights: dict[str, nn.Parameter], step: int, without: frozenset[str] = frozenset()) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, weight in weights.items():
        gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        weight.grad = None if name in without else gradient


def pytorch_optimizer(config: TwoMoments.Config, weights: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [w for n, w in weights.items() if n in DECAYED], "weight_decay": config.weight_decay},
        {"params": [w for n, w in weights.items() if n not in DECAYED], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if isinstance(config, AdamW.Config) else torch.optim.Adam
    return kind(
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_equals_pytorch_bit_for_bit(kind: type[TwoMoments], implementation: Any) -> None:
    config = kind.Config(lr=PEAK, implementation=implementation, weight_decay=0.3, beta1=0.8, beta2=0.9)
    ours, theirs = some_weights(), some_weights()
    optimizer, reference = built(config, ours), pytorch_optimizer(config, theirs)
    for step, factor in enumerate(FACTORS):
        absent = frozenset({"w1.weight", "norm.weight"}) if step in (0, 3) else frozenset()
        for side in (ours, theirs):
            set_gradients(side, step, without=absent)
        for group in reference.param_groups:
            group["lr"] = PEAK * factor
        optimizer.step(factor)
        reference.step()
        for key in SHAPES:
            assert torch.equal(ours[key], theirs[key]), f"{key} after step {step}"
    for key, state in optimizer.state.items():
        expected = reference.state[theirs[key]]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[part], expected[part]) for part in state), key


def test_implementations_agree() -> None:
    results = []
    for implementation in ("fused", "foreach", "for-loop"):
        weights = some_weights()
        optimizer = built(AdamW.Config(lr=PEAK, implementation=implementation), weights)
        for step, factor in enumerate(FACTORS):
            set_gradients(weights, step)
            optimizer.step(factor)
        results.append([weight.detach() for weight in weights.values()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_adamw_by_hand() -> None:
    """One weight 2, gradient 0.5: both corrected moments are those of the gradient, the update is its sign."""
    weights = {"w.weight": nn.Parameter(torch.tensor([2.0], dtype=torch.float64))}
    optimizer = built(AdamW.Config(lr=0.02, weight_decay=0.1, eps=0.0), weights)
    weights["w.weight"].grad = torch.tensor([0.5], dtype=torch.float64)
    optimizer.step(0.5)
    assert weights["w.weight"].item() == pytest.approx(2.0 * (1 - 0.01 * 0.1) - 0.01)


def shrunk(config: Optimizer.Config, weights: dict[str, nn.Parameter]) -> set[str]:
    """Names of the weights that a step with zero gradients moves."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = built(config, weights)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(1.0)
    return {name for name, weight in weights.items() if not torch.equal(weight, before[name])}


def test_norms_and_biases_are_not_shrunk_by_default() -> None:
    assert shrunk(AdamW.Config(), some_weights()) == DECAYED


def of_decoder(model: Any) -> tuple[list[Weight], list[str], list[str]]:
    """The weights of a decoder, the names of those that are shrunk by default, and of the others."""
    named = list(weights_of(meta_model(model)))
    optimizer = AdamW.Config().build(weights=named, layout=SingleRank(torch.device("meta")))
    decays = {name: optimizer.weight_decay(weight) for name, weight in optimizer.weights.items()}
    assert set(decays.values()) <= {0.0, 0.1}
    return named, [name for name in decays if decays[name]], [name for name in decays if not decays[name]]


def test_default_globs_on_a_decoder() -> None:
    """Every vector of the model is a norm here, and no matrix is exempt."""
    named, decayed, exempt = of_decoder(Toy.Config())
    assert decayed == [weight.name for weight in named if weight.value.dim() == 2]
    assert exempt == [weight.name for weight in named if weight.value.dim() == 1]


def test_default_globs_on_experts_sinks_and_biases() -> None:
    """Biases of experts are matrices, and are not shrunk either."""
    config = ToyMoE.Config()
    config.attention.bias = config.attention.sinks = True
    config.moe.router.bias = config.moe.experts.bias = True
    named, decayed, exempt = of_decoder(config)
    vectors = {"layers.1.attention.sinks", "layers.1.moe.router.gate.bias", "layers.1.moe.experts.w1.bias"}
    assert vectors | {"layers.1.attention.wq.bias", "layers.1.attention.q_norm.weight"} <= set(exempt)
    assert "layers.1.moe.experts.w1.weight" in decayed and "layers.1.moe.router.gate.weight" in decayed
    names = [weight.name for weight in named]
    assert decayed == [name for name in names if name.endswith(".weight") and "norm" not in name]


def test_a_stack_of_matrices_is_told_by_its_axes() -> None:
    config = ToyMoE.Config()
    config.moe.experts.bias = True
    optimizer = AdamW.Config().build(weights=weights_of(meta_model(config)), layout=SingleRank(torch.device("meta")))
    block = {name.removeprefix("layers.1."): weight for name, weight in optimizer.weights.items()}
    assert [block[f"moe.{name}"].is_matrix for name in ("experts.w1.weight", "experts.w1.bias")] == [True, False]
    assert block["moe.experts.w1.bias"].shape == (6, 12) and block["attention.wq.weight"].is_matrix
    assert not block["attention_norm.weight"].is_matrix


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ([], set(SHAPES)),
        (["*"], set()),
        (["embed.*", "scalar"], set(SHAPES) - {"embed.weight", "scalar"}),
        (["norm.weight"], set(SHAPES) - {"norm.weight"}),
        (["*NORM*"], set(SHAPES)),
    ],
)
def test_globs_exempt_weights(globs: list[str], expected: set[str]) -> None:
    assert shrunk(AdamW.Config(no_decay=globs), some_weights()) == expected


def test_frozen_weights_are_left_alone() -> None:
    weights = some_weights()
    weights["w1.weight"].requires_grad_(False)
    optimizer = built(AdamW.Config(), weights)
    before = weights["w1.weight"].clone()
    set_gradients({name: weight for name, weight in weights.items() if weight.requires_grad}, step=0)
    optimizer.step(1.0)
    assert torch.equal(weights["w1.weight"], before)
    assert optimizer.state.keys() == optimizer.weights.keys() == SHAPES.keys() - {"w1.weight"}


def test_without_any_gradient_nothing_happens() -> None:
    weights = some_weights()
    optimizer = built(AdamW.Config(), weights)
    optimizer.step(1.0)
    assert optimizer.gradients() == [] and not any(
        each.any() for kept in optimizer.state.values() for each in kept.values()
    )
    assert all(
        torch.equal(weight, same) for weight, same in zip(weights.values(), some_weights().values(), strict=True)
    )


def test_gradients_and_zero_grad() -> None:
    weights = some_weights()
    optimizer = built(AdamW.Config(), weights)
    set_gradients(weights, step=0, without=frozenset({"w1.bias"}))
    gradients = optimizer.gradients()
    assert [id(g) for g in gradients] == [id(w.grad) for n, w in weights.items() if n != "w1.bias"]
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in weights.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr: lr -1.0 must be a finite number, not negative"),
        ({"lr": math.nan}, "lr: lr nan must be"),
        ({"weight_decay": math.inf}, "weight_decay: weight_decay inf must be"),
        ({"eps": 0.0}, "eps: eps 0.0 must be above 0"),
        ({"eps": math.nan}, "eps: eps nan must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay: weight_decay -0.1 must be a finite number, not negative"),
        ({"beta1": 1.0}, r"beta1: beta1 1.0 must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2: beta2 -0.1 must be in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(AdamW.Config(**change))


def test_globs_that_fit_no_weight_are_told_with_names_like_them() -> None:
    model = meta_model(Toy.Config())
    check_optimizer(AdamW.Config(), model)  # of whose globs *.bias and *.sinks fit no weight
    check_optimizer(AdamW.Config(no_decay=[]), model)
    check_optimizer(AdamW.Config(no_decay=["*", "layers.[01].*"]), model)
    with pytest.raises(UserError) as caught:
        check_optimizer(AdamW.Config(no_decay=["*norm.weight", "layers.*.atention.wq.weight", "b"]), model)
    expected = "no weight is called layers.*.atention.wq.weight, b; did you mean layers.*.attention.wq.weight"
    assert str(caught.value).startswith(f"optimizer.no_decay: {expected}")
    with pytest.raises(UserError, match=r"called a, b; there are tok_embeddings.weight, layers.\*.attention_norm"):
        check_optimizer(AdamW.Config(no_decay=["a", "b"]), model)


def test_what_only_stands_for_several_optimizers_is_refused() -> None:
    for kind in (Optimizer, TwoMoments):
        with pytest.raises(UserError, match=rf"^{kind.__name__} is abstract: .*, Adam.Config or AdamW.Config"):
            validate(kind.Config())
