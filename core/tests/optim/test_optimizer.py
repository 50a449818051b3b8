"""The optimizer against PyTorch's own classes, bit for bit, and which weights it shrinks or leaves alone."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.module import weights as weights_of
from core.optim.optimizer import Optimizer, check_no_decay
from core.testing.toy import Toy, ToyMoE, meta_model

SHAPES = {
    "embed.weight": (7, 5),
    "attention_norm.weight": (5,),
    "w1.weight": (33, 5),
    "w1.bias": (33,),
    "norm.weight": (5,),
    "scalar": (),
}
DECAYED = {"embed.weight", "w1.weight", "scalar"}
RATES = [1e-2, 3e-3, 0.0, 2e-2, 1e-3]


def some_weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in SHAPES.items()}


def set_gradients(weights: dict[str, nn.Parameter], step: int, without: frozenset[str] = frozenset()) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, weight in weights.items():
        gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        weight.grad = None if name in without else gradient


def pytorch_optimizer(config: Optimizer.Config, weights: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [w for n, w in weights.items() if n in DECAYED], "weight_decay": config.weight_decay},
        {"params": [w for n, w in weights.items() if n not in DECAYED], "weight_decay": 0.0},
    ]
    return {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[config.name](
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_equals_pytorch_bit_for_bit(name: Any, implementation: Any, dtype: torch.dtype) -> None:
    config = Optimizer.Config(name=name, implementation=implementation, weight_decay=0.3, beta1=0.8, beta2=0.9)
    ours, theirs = some_weights(dtype), some_weights(dtype)
    optimizer, reference = config.build(weights=ours.items()), pytorch_optimizer(config, theirs)
    for step, lr in enumerate(RATES):
        absent = frozenset({"w1.weight", "norm.weight"}) if step in (0, 3) else frozenset()
        for side in (ours, theirs):
            set_gradients(side, step, without=absent)
        for group in reference.param_groups:
            group["lr"] = lr
        optimizer.step(lr)
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
        optimizer = Optimizer.Config(implementation=implementation).build(weights=weights.items())
        for step, lr in enumerate(RATES):
            set_gradients(weights, step)
            optimizer.step(lr)
        results.append([weight.detach() for weight in weights.values()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_adamw_by_hand() -> None:
    """One weight 2, gradient 0.5: both corrected moments are those of the gradient, the update is its sign."""
    weights = {"w.weight": nn.Parameter(torch.tensor([2.0], dtype=torch.float64))}
    optimizer = Optimizer.Config(weight_decay=0.1, eps=0.0).build(weights=weights.items())
    weights["w.weight"].grad = torch.tensor([0.5], dtype=torch.float64)
    optimizer.step(0.01)
    assert weights["w.weight"].item() == pytest.approx(2.0 * (1 - 0.01 * 0.1) - 0.01)


def shrunk(config: Optimizer.Config, weights: dict[str, nn.Parameter]) -> set[str]:
    """Names of the weights that a step with zero gradients moves."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = config.build(weights=weights.items())
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(0.1)
    return {name for name, weight in weights.items() if not torch.equal(weight, before[name])}


def test_norms_and_biases_are_not_shrunk_by_default() -> None:
    assert shrunk(Optimizer.Config(), some_weights()) == DECAYED


def test_default_globs_on_a_decoder() -> None:
    """Every vector of the model is a norm here, and no matrix is exempt."""
    named = [(weight.name, weight.value) for weight in weights_of(meta_model(Toy.Config()))]
    (_, decayed), (none, exempt) = Optimizer.Config().build(weights=named).groups
    assert none == 0.0
    assert decayed == [name for name, value in named if value.dim() == 2]
    assert exempt == [name for name, value in named if value.dim() == 1]


def test_default_globs_on_experts_sinks_and_biases() -> None:
    """Biases of experts are matrices, and are not shrunk either."""
    config = ToyMoE.Config()
    config.attention.bias = config.attention.sinks = True
    config.moe.router.bias = config.moe.experts.bias = True
    named = [(weight.name, weight.value) for weight in weights_of(meta_model(config))]
    (_, decayed), (_, exempt) = Optimizer.Config().build(weights=named).groups
    vectors = {"layers.1.attention.sinks", "layers.1.moe.router.gate.bias", "layers.1.moe.experts.w1.bias"}
    assert vectors | {"layers.1.attention.wq.bias", "layers.1.attention.q_norm.weight"} <= set(exempt)
    assert "layers.1.moe.experts.w1.weight" in decayed and "layers.1.moe.router.gate.weight" in decayed
    assert decayed == [name for name, _ in named if name.endswith(".weight") and "norm" not in name]


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
    assert shrunk(Optimizer.Config(no_decay=globs), some_weights()) == expected


def test_frozen_weights_are_left_alone() -> None:
    weights = some_weights()
    weights["w1.weight"].requires_grad_(False)
    optimizer = Optimizer.Config().build(weights=weights.items())
    before = weights["w1.weight"].clone()
    set_gradients({name: weight for name, weight in weights.items() if weight.requires_grad}, step=0)
    optimizer.step(0.1)
    assert torch.equal(weights["w1.weight"], before)
    assert optimizer.state.keys() == optimizer.weights.keys() == SHAPES.keys() - {"w1.weight"}


def test_without_any_gradient_nothing_happens() -> None:
    weights = some_weights()
    optimizer = Optimizer.Config().build(weights=weights.items())
    optimizer.step(0.1)
    assert optimizer.state == {} and optimizer.gradients() == []
    assert all(
        torch.equal(weight, same) for weight, same in zip(weights.values(), some_weights().values(), strict=True)
    )


def test_gradients_and_zero_grad() -> None:
    weights = some_weights()
    optimizer = Optimizer.Config().build(weights=weights.items())
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
        ({"name": "SGD"}, "name: expected 'AdamW' or 'Adam', got 'SGD'"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Optimizer.Config(**change))


NAMES = ["tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.1.attention.wq.weight", "norm.weight"]


def test_globs_that_fit_no_weight_are_told_with_names_like_them() -> None:
    check_no_decay(Optimizer.Config(), NAMES)  # of which *.bias and *.sinks fit none
    check_no_decay(Optimizer.Config(no_decay=[]), NAMES)
    check_no_decay(Optimizer.Config(no_decay=["*", "layers.[01].*"]), NAMES)
    with pytest.raises(UserError) as caught:
        check_no_decay(Optimizer.Config(no_decay=["*norm.weight", "layers.*.atention.wq.weight", "b"]), NAMES)
    expected = "no weight is called layers.*.atention.wq.weight, b; did you mean layers.*.attention.wq.weight"
    assert str(caught.value).startswith(f"optimizer.no_decay: {expected}")
    with pytest.raises(UserError, match=r"called a, b; there are tok_embeddings.weight, layers.\*.attention.wq"):
        check_no_decay(Optimizer.Config(no_decay=["a", "b"]), NAMES)
