"""Layers of one's own, replaced and wrapped forwards: every layout computes what one rank does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers_of_a_user import Clipped, EightBit, EightBitLinear
from torch import Tensor

from core.parallel.settings import Parallelism
from core.testing.parity import Case, compare, result_of
from core.testing.toy import Toy, toy_attention

LAYOUTS = {"fsdp2": Parallelism(), "tp2": Parallelism(tensor_parallel_degree=2)}
EXACT: dict[str, Any] = {"weights_dtype": torch.float64, "compute_dtype": torch.float64}
"""So that sums in another order round to the same 8 bits."""


def model(kind: type[Toy] = EightBit) -> Toy.Config:
    return kind.Config(vocab_size=62, attention=replace(toy_attention(), bias=True))


@pytest.mark.layout
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_layers_of_a_user_equal_one_rank(layout: str, checkpoint: Any) -> None:
    worst = compare(Case(model(), LAYOUTS[layout], world_size=2, checkpoint=checkpoint, **EXACT))
    assert worst["loss"] < 1e-6 and worst["gradient"] < 1e-5 and worst["next loss"] < 1e-5


def test_the_layers_matter() -> None:
    """What the others compare is another model than the plain one, in its loss and in the gradient of each part."""
    found, plain = (result_of(Case(model(kind), **EXACT)) for kind in (EightBit, Toy))
    assert found.gradients.keys() == plain.gradients.keys() and abs(found.loss - plain.loss) > 1e-4
    for part in ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2"):
        ours, theirs = (result.gradients[f"layers.0.{part}.weight"] for result in (found, plain))
        assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


@torch.no_grad()
def test_the_layer_is_what_it_says() -> None:
    layer, x = Clipped(4, 3, std=1.0), torch.tensor([[0.3, -9.0, 1.0625, 5.0]])
    layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.03]]))
    expected: Tensor = torch.tensor([[0.3125, -4.0, 1.0 + 4.0]])  # 1.0625 lies between 1 and 1.125, at the even one
    assert torch.equal(layer(x), expected) and isinstance(layer, EightBitLinear)
