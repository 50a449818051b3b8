"""Muon against PyTorch's on one rank and against a decomposition; which weights it takes; what rounding does to it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.start import Constant
from core.nn.weights import Weight
from core.nn.weights import weights as weights_of
from core.optim.adam import AdamW
from core.optim.muon import Muon, orthogonal
from core.parallel.layout import SingleRank
from core.runtime.meta import meta_model
from core.step.checks import check_optimizer
from core.testing.toy import Toy, ToyMoE

CPU = torch.device("cpu")
SHAPES = {"wide": (12, 30), "tall": (40, 16), "square": (24, 24)}
FACTORS = [0.25, 1.0, 0.5]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_pytorch_bit_for_bit_in_its_type(scale: Any, nesterov: bool) -> None:
    ours = {name: nn.Parameter(drawn(i, *shape)) for i, (name, shape) in enumerate(SHAPES.items())}
    theirs = {name: nn.Parameter(weight.detach().clone()) for name, weight in ours.items()}
    config = Muon.Config(lr=2e-2, nesterov=nesterov, scale=scale, ns_dtype="bfloat16", weight_decay=0.2, momentum=0.9)
    named = [Weight(name, value, ("ffn", "embed"), Constant(0.0)) for name, value in ours.items()]
    optimizer: Muon = config.build(weights=named, layout=SingleRank(CPU))
    reference = torch.optim.Muon(
        theirs.values(), lr=2e-2, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn=scale
    )
    for step, factor in enumerate(FACTORS):
        for i, name in enumerate(SHAPES):
            ours[name].grad = drawn(100 * step + i, *SHAPES[name])
            theirs[name].grad = drawn(100 * step + i, *SHAPES[name])
        reference.param_groups[0]["lr"] = 2e-2 * factor
        reference.step()
        optimizer.step(factor)
        for name in SHAPES:
            assert torch.equal(optimizer.state[name]["momentum"], reference.state[theirs[name]]["momentum_buffer"])
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 12, 30), (2, 40, 16), (1, 24, 24)])
def test_singular_vectors_stay_and_values_become_those_of_the_polynomial(shape: tuple[int, int, int]) -> None:
    x_NRC = drawn(5, *shape)
    u, s, vt = torch.linalg.svd(x_NRC.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    found = orthogonal(x_NRC, steps=5, dtype=torch.float32)
    torch.testing.assert_close(found.double(), u * s.unsqueeze(-2) @ vt, rtol=1e-4, atol=1e-5)
    assert not orthogonal(torch.zeros(shape), steps=5, dtype=torch.float32).any()


@pytest.mark.parametrize("rank", [1, 4, 16, 48])
def test_a_gradient_of_low_rank_is_not_turned_into_noise(rank: int) -> None:
    """A factor of 1.001 changes nothing but rounding; in bfloat16 it moves the update by much where the rank is low."""
    x_NRC = drawn(1, 1, 48, rank) @ drawn(2, 1, rank, 96)

    def change(dtype: torch.dtype) -> float:
        found, other = (orthogonal(x * 1.0, steps=5, dtype=dtype) for x in (x_NRC, 1.001 * x_NRC))
        return ((found - other).norm() / found.norm()).item()

    assert change(torch.float32) < 1e-3
    assert rank > 4 or change(torch.bfloat16) > 0.1


def taken(config: Muon.Config, model: Any) -> tuple[set[str], dict[str, set[str]]]:
    """Names of the weights of a model that Muon updates itself, and what is kept of every weight."""
    optimizer: Muon = config.build(weights=weights_of(meta_model(model)), layout=SingleRank(CPU))
    return (
        {name for name, weight in optimizer.weights.items() if optimizer.config.orthogonalises(weight)},
        {name: set(state) for name, state in optimizer.state.items()},
    )


def test_matrices_are_told_by_their_axes_and_by_name() -> None:
    model = ToyMoE.Config(n_layers=2)
    model.moe.experts.bias = model.attention.bias = True
    found, kept = taken(Muon.Config(), model)
    attention = {f"layers.{i}.attention.{name}.weight" for i in range(2) for name in ("wq", "wk", "wv", "wo")}
    dense = {f"layers.0.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
    experts = {
        f"layers.1.moe.{part}.{name}.weight" for part in ("experts", "shared_experts") for name in ("w1", "w2", "w3")
    }
    assert found == attention | dense | experts
    adam = {"step", "exp_avg", "exp_avg_sq"}
    assert all(state == ({"momentum"} if name in found else adam) for name, state in kept.items())
    fewer, _ = taken(Muon.Config(companion_weights=["*.attention.w[qk].weight"]), model)
    assert found - fewer == {name for name in attention if name.endswith(("wq.weight", "wk.weight"))}


def test_the_companion_has_peaks_and_decay_of_its_own() -> None:
    model = meta_model(Toy.Config())
    named = [each._replace(value=nn.Parameter(drawn(0, *each.value.shape))) for each in weights_of(model)]
    copies = [each._replace(value=nn.Parameter(each.value.detach().clone())) for each in named]
    companion = AdamW.Config(lr=3e-3, weight_decay=0.3, no_decay=[])
    muon: Muon = Muon.Config(lr=1e-2, companion=companion).build(weights=named, layout=SingleRank(CPU))
    alone: AdamW = companion.build(weights=copies, layout=SingleRank(CPU))
    for step, factor in enumerate(FACTORS):
        for ours, theirs in zip(named, copies, strict=True):
            ours.value.grad = drawn(step, *ours.value.shape)
            theirs.value.grad = drawn(step, *ours.value.shape)
        muon.step(factor)
        alone.step(factor)
    for ours, theirs in zip(named, copies, strict=True):
        assert torch.equal(ours.value, theirs.value) != muon.config.orthogonalises(ours), ours.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 1.0}, r"momentum: momentum 1.0 must be in \[0, 1\)"),
        ({"ns_steps": 0}, "ns_steps: ns_steps 0 must be from 1 to 20"),
        ({"lr": -1.0}, "lr: lr -1.0 must be a finite number"),
        ({"companion": AdamW.Config(beta1=2.0)}, "companion.beta1: beta1 2.0 must be in"),
        ({"scale": "none"}, "scale: expected 'match_rms_adamw' or 'original', got 'none'"),
    ],
)
def test_settings_of_muon_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Muon.Config(**change))


def test_patterns_of_muon_that_fit_no_weight() -> None:
    model = meta_model(Toy.Config())
    check_optimizer(Muon.Config(companion_weights=["*.attention.*"]), model)
    with pytest.raises(UserError) as caught:
        check_optimizer(Muon.Config(companion_weights=["*.atention.*"], companion=AdamW.Config(no_decay=["x"])), model)
    first, second = str(caught.value).splitlines()
    assert first.startswith("optimizer.companion_weights: no weight is called *.atention.*; ")
    assert second.startswith("optimizer.companion.no_decay: no weight is called x; ")
