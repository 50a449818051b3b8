"""Every axis that a weight names is in the table, and the table says what is cut."""

import pytest
import torch
from layout_cases import attention, dense, sparse
from torch import nn

from core.nn.decoder import Block, Decoder
from core.nn.module import Module
from core.nn.start import Normal
from core.nn.weights import weights
from core.parallel.rules import RULES, check_axes, cut_dim, named_weights
from core.runtime.meta import meta_model
from core.testing.toy import Toy

TOYS = {"dense": dense(attention=attention(sinks=True)), "sparse": sparse(n_mtp_layers=1)}


@pytest.mark.parametrize("config", TOYS.values(), ids=TOYS)
def test_every_axis_of_every_weight_is_in_the_table(config: Decoder.Config) -> None:
    model = meta_model(config)
    check_axes(model)
    assert {axis for weight in weights(model) for axis in weight.axes} <= RULES.keys()


@pytest.mark.parametrize("config", TOYS.values(), ids=TOYS)
def test_every_weight_is_named_by_one_module(config: Decoder.Config) -> None:
    """`named_weights` of all modules together are all weights, with the axes that the model states."""
    model = meta_model(config)
    found = [named for module in model.modules() for named in named_weights(module)]
    places = {id(named.owner._parameters[named.leaf]): named for named in found}
    assert len(places) == len(found)
    for weight in weights(model):
        assert places.pop(id(weight.value)).axes == weight.axes, weight.name
    assert not places


def test_what_is_cut() -> None:
    """By hand: outputs of the first products, inputs of the last ones, and what belongs to a head."""
    model = meta_model(TOYS["dense"])
    dims = {weight.name: cut_dim(weight.axes, "tensor") for weight in weights(model) if ".1." not in weight.name}
    block, attention_ = "layers.0.", "layers.0.attention."
    assert dims == {
        "tok_embeddings.weight": 0,
        "output.weight": 0,
        "norm.weight": None,
        block + "attention_norm.weight": None,
        block + "ffn_norm.weight": None,
        block + "feed_forward.w1.weight": 0,
        block + "feed_forward.w3.weight": 0,
        block + "feed_forward.w2.weight": 1,
        **{f"{attention_}{name}.{leaf}": 0 for name in ("wq", "wk", "wv") for leaf in ("weight", "bias")},
        attention_ + "wo.weight": 1,
        attention_ + "wo.bias": None,
        attention_ + "q_norm.weight": None,
        attention_ + "k_norm.weight": None,
        attention_ + "sinks": 0,
    }
    model = meta_model(TOYS["sparse"])
    for weight in weights(model):
        inside = ".experts." in weight.name
        assert cut_dim(weight.axes, "expert") == (0 if inside else None), weight.name
        assert not inside or cut_dim(weight.axes, "tensor") is None, weight.name
        assert ".router." not in weight.name or cut_dim(weight.axes, "tensor") is None, weight.name


def test_a_bias_joins_a_sum_where_the_last_axis_of_its_weight_is_cut() -> None:
    model = meta_model(TOYS["sparse"])
    names = {id(value): name for name, value in model.named_parameters()}
    summands = {
        names[id(named.owner._parameters[named.leaf])]
        for module in model.modules()
        for named in named_weights(module)
        if named.summand
    }
    assert summands == {f"layers.{i}.attention.wo.bias" for i in range(3)}


class Odd(Module):
    """A part with an axis that nobody has heard of."""

    AXES = {"weight": ("embed", "moon")}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, 3))
        self.start = {"weight": Normal(0.1)}


class OddToy(Toy):
    """A toy with an odd part in every block."""

    def block(self, i: int) -> Block:
        block = super().block(i)
        block.odd = Odd()
        return block


def test_an_unknown_axis_names_the_weight() -> None:
    with torch.device("meta"):
        model = OddToy(Toy.Config())
    with pytest.raises(
        TypeError, match=r"layers\.0\.odd\.weight: .* the axis 'moon' of \('embed', 'moon'\); use one of "
    ):
        check_axes(model)


def test_two_axes_on_one_mesh_axis_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="lie on tensor"):
        cut_dim(("heads", "ffn"), "tensor")
