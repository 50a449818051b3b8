"""Weights know their axes and their start; parameters and FLOPs are counted from what was built."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.nn.decoder import Decoder
from core.nn.layers import Linear, RMSNorm
from core.nn.module import Flops, Module
from core.nn.start import Constant, Normal
from core.nn.weights import Weight, parameter_count, training_flops_per_token, weights
from core.optim.groups import Group, freeze
from core.runtime.meta import meta_model
from core.testing.toy import Toy, ToyMoE, on_cpu


class Parts(Module):
    """A matrix of its own, a child with a bias, and a child that names its axes itself."""

    AXES = {"table": ("vocab", "embed"), "project": ("ffn", "embed"), "norm": ("embed",)}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(5, 3))
        self.start = {"table": Normal(0.5)}
        self.project = Linear(3, 4, std=0.1, bias=True)
        self.norm = RMSNorm(3, eps=1e-6)


def test_weights_come_with_axes_and_start() -> None:
    model = Parts()
    assert list(weights(model)) == [
        Weight("table", model.table, ("vocab", "embed"), Normal(0.5)),
        Weight("project.weight", model.project.weight, ("ffn", "embed"), Normal(0.1)),
        Weight("project.bias", model.project.bias, ("ffn",), Constant(0.0)),
        Weight("norm.weight", model.norm.weight, ("embed",), Constant(1.0)),
    ]


def test_axes_of_a_decoder() -> None:
    named = {weight.name: weight.axes for weight in weights(meta_model(Toy.Config()))}
    expected = {
        "tok_embeddings.weight": ("vocab", "embed"),
        "layers.1.attention_norm.weight": ("embed",),
        "layers.1.attention.wq.weight": ("heads", "embed"),
        "layers.1.attention.wk.weight": ("heads", "embed"),
        "layers.1.attention.wv.weight": ("heads", "embed"),
        "layers.1.attention.wo.weight": ("embed", "heads"),
        "layers.1.attention.q_norm.weight": ("head",),
        "layers.1.attention.k_norm.weight": ("head",),
        "layers.1.ffn_norm.weight": ("embed",),
        "layers.1.feed_forward.w1.weight": ("ffn", "embed"),
        "layers.1.feed_forward.w3.weight": ("ffn", "embed"),
        "layers.1.feed_forward.w2.weight": ("embed", "ffn"),
        "norm.weight": ("embed",),
        "output.weight": ("vocab", "embed"),
    }
    assert {name: axes for name, axes in named.items() if ".0." not in name} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_counts_once(tied: bool) -> None:
    model = meta_model(Toy.Config(tie_embeddings=tied))
    names = [weight.name for weight in weights(model)]
    assert ("output.weight" in names) is not tied
    # per block: q 4*8, k and v 2*8, o 4*8, three matrices of 24, two norms of 16, two of 8
    block = 16 * (32 + 16 + 16 + 32) + 3 * 16 * 24 + 2 * 16 + 2 * 8
    assert parameter_count(model) == 2 * block + 16 + (1 if tied else 2) * 64 * 16


def test_a_weight_without_axes_is_an_error() -> None:
    model = Parts()
    model.extra = Linear(3, 3, std=0.1)
    with pytest.raises(TypeError, match="extra.weight: no AXES name this weight; add it to Linear or to its parent"):
        list(weights(model))


def test_axes_of_a_child_are_those_of_its_weight_alone() -> None:
    model = Parts()
    model.project.scale = nn.Parameter(torch.empty(4, 3))
    with pytest.raises(TypeError, match="project.scale: no AXES"):
        list(weights(model))


def test_axes_of_the_wrong_rank_are_an_error() -> None:
    model = Parts()
    model.norm = Linear(3, 3, std=0.1)
    with pytest.raises(TypeError, match=r"norm.weight: AXES \('embed',\) name 1 axes, the weight has shape \(3, 3\)"):
        list(weights(model))


def test_a_weight_without_start_is_an_error() -> None:
    model = Parts()
    del model.start["table"]
    with pytest.raises(TypeError, match="table: Parts.start does not say how this weight is drawn"):
        list(weights(model))


def test_flops_are_three_times_the_forward_ones() -> None:
    class Scores(Module):
        def flops_per_token(self, seq_len: int) -> Flops:
            return Flops(attention=7 * seq_len)

    model = nn.ModuleDict({"table": Parts(), "scores": Scores(), "plain": nn.Linear(2, 2)})
    assert training_flops_per_token(model, 10) == Flops(matmul=3 * 2 * 12, attention=3 * 70)


@pytest.mark.parametrize("frozen", [[], ["*.w1.weight", "output.weight"], ["tok_embeddings.*", "layers.0.*"]], ids=str)
@pytest.mark.parametrize("config", [Toy.Config(n_layers=3), ToyMoE.Config(n_layers=3)], ids=["dense", "sparse"])
def test_a_frozen_weight_saves_a_product(config: Decoder.Config, frozen: list[str]) -> None:
    """Products of weights are those that torch counts, forward and backward."""
    model, length = on_cpu(config), 32
    freeze(model.named_parameters(), [Group(pattern=pattern, frozen=True) for pattern in frozen])
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, length, dtype=torch.long)).sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in kinds.items() if "attention" not in str(op))
    assert products == training_flops_per_token(model, length).matmul * 2 * length


@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_those_that_torch_counts(tied: bool) -> None:
    """A tied head is a product like any other, an embedding lookup is none; torch counts whole attention squares."""
    model, length = on_cpu(Toy.Config(tie_embeddings=tied)), 32
    tokens_BL = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens_BL)
    assert counter.get_total_flops() * 3 == training_flops_per_token(model, length).total * tokens_BL.numel()
