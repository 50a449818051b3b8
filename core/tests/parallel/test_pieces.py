"""The piece of a weight that a rank holds: where it lies in the whole, how it starts, what it adds to the norm."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from layout_cases import attention, dense, sparse
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.comm.all_to_all import AllToAll
from core.nn.decoder import Decoder
from core.nn.feed_forward import FeedForward
from core.parallel.apply import dtensor_slice
from core.parallel.data import count_pieces
from core.parallel.layout import RankView, SingleRank, Wrapping
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.step.assemble import BuiltModel, assemble
from core.testing.layout_suite import degrees
from core.testing.ranks import run_ranks
from core.testing.toy import on_cpu

CPU = torch.device("cpu")
UNEVEN = dense(vocab_size=61, attention=attention(sinks=True), feed_forward=FeedForward.Config(hidden_dim=22))
NARROW = dense(vocab_size=7, feed_forward=FeedForward.Config(hidden_dim=5), tie_embeddings=True)
MIXED = sparse(8, hidden_dim=10)
FEW = sparse(3, hidden_dim=12)


class Spot(NamedTuple):
    """A model on ranks."""

    model: Decoder.Config
    n: int
    parallelism: Parallelism


SPOTS = {
    "ddp2": Spot(UNEVEN, 2, degrees(replicate=2)),
    "hsdp2x2": Spot(UNEVEN, 4, degrees(replicate=2)),
    "tp4": Spot(UNEVEN, 4, degrees(tensor=4)),
    "narrow-tied-fsdp2-tp2": Spot(NARROW, 4, degrees(tensor=2)),
    "ep2-fsdp2": Spot(MIXED, 4, degrees(expert=2)),
    "ep2-hsdp2-tp2": Spot(MIXED, 4, degrees(expert=2, tensor=2, replicate=2)),
    "few-experts-fsdp4": Spot(FEW, 4, degrees()),
    "pp2-ep2-tp2": Spot(MIXED, 4, degrees(pipeline=2, expert=2, tensor=2)),
}
WIDE_SPOTS = {
    "fsdp8": Spot(UNEVEN, 8, degrees()),
    "fsdp2-tp4": Spot(UNEVEN, 8, degrees(tensor=4)),
    "fsdp4-tp2": Spot(UNEVEN, 8, degrees(tensor=2)),
    "cp2-tp2-fsdp2": Spot(UNEVEN, 8, degrees(context=2, tensor=2)),
    "narrow-tied-fsdp4-tp2": Spot(NARROW, 8, degrees(tensor=2)),
    "ep4-tp2-fsdp4": Spot(MIXED, 8, degrees(expert=4, tensor=2)),
    "few-experts-ep2-fsdp4": Spot(sparse(4), 8, degrees(expert=2)),
    "few-experts-odd-width-fsdp8": Spot(sparse(4, hidden_dim=10), 8, degrees()),
    "pp2-ep2-tp2-fsdp2": Spot(MIXED, 8, degrees(pipeline=2, expert=2, tensor=2)),
}


def build(spot: Spot, layout: RankView, dtype: torch.dtype) -> BuiltModel:
    wrapping = Wrapping(
        compute_dtype=torch.float32,
        checkpoint=ActivationCheckpoint.Config(mode="none").build(folder=Path()).apply,
        dispatcher=AllToAll,
    )
    return assemble(
        spot.model,
        layout,
        wrapping,
        dtype=dtype,
        seed=5,
        n_microbatches=2,
    )


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Numbers that stand for a gradient; some are hundreds of times larger than others."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * 10 ** (len(name) % 4)


class Kept(NamedTuple):
    """What a rank holds: for each weight where it begins, its start, its scaled gradient, into how many it is cut."""

    weights: dict[str, tuple[tuple[int, ...], Tensor, Tensor, int]]
    norms: list[float]


def kept(spot: Spot, dtype: torch.dtype, max_norms: list[float]) -> Kept:
    """Also checks that PyTorch puts pieces together where `dtensor_slice` says that they lie."""
    layout = ManyRanks(spot.parallelism, CPU)
    named = dict(build(spot, layout, dtype).named_parameters())
    starts = {name: dtensor_slice(weight).value.clone() for name, weight in named.items()}
    gradients: dict[str, Any] = {}
    for name, weight in named.items():
        gradients[name] = torch.empty_like(weight, dtype=torch.float32)
        piece = dtensor_slice(gradients[name])
        whole = drawn(name, weight.shape)
        piece.value.copy_(whole[cut(piece.start, piece.value.shape)])
        assert torch.equal(gradients[name].full_tensor(), whole), name
    norms = [layout.clip(gradients.values(), max_norm) for max_norm in max_norms]
    return Kept(
        {
            name: (dtensor_slice(value).start, starts[name], dtensor_slice(value).value, count_pieces(value))
            for name, value in gradients.items()
        },
        norms,
    )


def cut(start: tuple[int, ...], shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


@pytest.mark.parametrize("name", [*SPOTS, *(pytest.param(name, marks=pytest.mark.matrix) for name in WIDE_SPOTS)])
def test_pieces_make_up_the_whole(name: str) -> None:
    """Every number of every weight lies on the same number of ranks, and starts as on one rank, bit for bit."""
    spot = (SPOTS | WIDE_SPOTS)[name]
    found = run_ranks(kept, spot.n, spot, torch.float32, [float("inf"), 50.0, 1e9])
    whole = dict(on_cpu(spot.model, seed=5).named_parameters())
    gradients = {name: drawn(name, weight.shape) for name, weight in whole.items()}
    norm = torch.stack([value.double().square().sum() for value in gradients.values()]).sum().sqrt().item()
    n_copies = spot.n // spot.parallelism.pipeline_parallel_degree
    for weight, value in whole.items():
        holders = [part.weights[weight] for part in found if weight in part.weights]
        covered = torch.zeros(value.shape, dtype=torch.int)
        for start, own, gradient, n_pieces in holders:
            place = cut(start, own.shape)
            covered[place] += 1
            assert torch.equal(own, value[place]), weight
            torch.testing.assert_close(gradient, gradients[weight][place] * 50 / (norm + 1e-6), rtol=1e-5, atol=0)
            assert n_pieces * covered.max() <= n_copies
        assert len(holders) == n_copies and (covered == n_copies // holders[0][3]).all(), weight
    for part in found:
        assert part.norms == pytest.approx([norm, norm, 50.0], rel=1e-6)
    assert set().union(*(part.weights for part in found)) == whole.keys()


def test_the_start_is_rounded_once() -> None:
    """Stored in bf16, weights are the same drawn numbers, rounded."""
    spot = SPOTS["ep2-hsdp2-tp2"]
    whole = dict(on_cpu(spot.model, seed=5).named_parameters())
    alone = dict(build(spot, SingleRank(CPU), torch.bfloat16).named_parameters())
    for part in run_ranks(kept, spot.n, spot, torch.bfloat16, [1.0]):
        for name, (start, own, *_) in part.weights.items():
            expected = whole[name][cut(start, own.shape)].bfloat16()
            assert torch.equal(own, expected) and torch.equal(own, alone[name][cut(start, own.shape)]), name


def first_products(spots: list[Spot]) -> list[tuple[Any, ...]]:
    """How the experts' first products are cut."""
    models = [dict(build(spot, ManyRanks(spot.parallelism, CPU), torch.float32).named_parameters()) for spot in spots]
    return [named["layers.1.moe.experts.w1.weight"].placements for named in models]


def test_experts_are_cut_by_width_where_they_are_few() -> None:
    """Three experts over four ranks leave one of them none; FSDP cuts a width evenly or not at all."""
    few, odd, many = (Spot(sparse(n, hidden_dim=width), 4, degrees()) for n, width in [(3, 12), (3, 10), (4, 12)])
    shared = Spot(sparse(2, hidden_dim=12), 4, degrees(expert=2))
    by_width, by_rows, by_experts, both = run_ranks(first_products, 4, [few, odd, many, shared])[0]
    assert by_width == (Shard(1),) and by_rows == by_experts == (Shard(0),)
    assert both == (Shard(1), Shard(0))


def partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    parts = {"whole": Replicate(), "cut": Shard(0), "partial": Partial()}
    labelled = {name: DTensor.from_local(torch.ones(2), mesh, [how]) for name, how in parts.items()}
    assert count_pieces(torch.ones(2)) == count_pieces(labelled["whole"]) == 1 and count_pieces(labelled["cut"]) == 2
    with pytest.raises(AssertionError, match="still partial"):
        count_pieces(labelled["partial"])
    return "seen"


def test_a_partial_gradient_has_no_norm() -> None:
    assert run_ranks(partial, 2) == ["seen"] * 2
