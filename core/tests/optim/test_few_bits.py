"""Stochastic rounding and eight bits against their definitions, and training that they must not hurt."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.errors import UserError
from core.nn.start import Constant
from core.nn.weights import Weight
from core.optim.adam import AdamW
from core.optim.few_bits import (
    AT_ONCE,
    IN_CACHE,
    NUMBERS_PER_SCALE,
    Draw,
    InBlocks,
    Rounded,
    from_eight_bits,
    hashes,
    magnitudes,
    random_bits,
    rounded,
    to_eight_bits,
)
from core.optim.muon import Muon
from core.optim.optimizer import Optimizer, updated_at_once
from core.parallel.layout import SingleRank
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.checks import check_blocks
from core.testing.toy import Toy
from core.train.trainer import Trainer

CPU = torch.device("cpu")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(n: int, text: str = "a") -> Tensor:
    return bits_of(Draw(text, (0,), torch.Size([n])), torch.zeros(n)).flatten()


def in_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    return rounded(value, bits).to(torch.int16).view(torch.bfloat16)


def decoded(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    found = torch.empty(codes.shape)
    from_eight_bits(codes, scales, signed=signed, out=found)
    return found


def bits_of(draw: Draw, like: Tensor) -> Tensor:
    return random_bits(*hashes(draw, like)).view(like.shape)


def built(config: Optimizer.Config, weight: nn.Parameter) -> Optimizer:
    axes = ("ffn", "embed")[: weight.dim()]
    return config.build(weights=[Weight("w.weight", weight, axes, Constant(0.0))], layout=SingleRank(CPU))


@pytest.mark.parametrize("shape", [(2**18,), (2**15, 8), (512, 512)])
def test_random_bits_are_even_and_differ_by_text_and_place(shape: tuple[int, ...]) -> None:
    n = 2**18
    found, other = (bits_of(Draw(text, (0,) * len(shape), torch.Size(shape)), torch.zeros(shape)) for text in "ab")
    counts = torch.bincount(found.flatten().long(), minlength=2**16)
    assert len(counts) == 2**16 and counts.float().std().item() == pytest.approx((n / 2**16) ** 0.5, rel=0.05)
    for moved in (other, found.roll(1, 0), found.roll(1, -1), found.roll(7, 0).roll(3, -1)):
        pair = torch.stack([found.double().flatten(), moved.double().flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / n**0.5
        together = (pair.long() >> 8).mul(torch.tensor([[256], [1]])).sum(0)  # also where no straight line shows it
        counts = torch.bincount(together, minlength=2**16)
        assert len(counts) == 2**16 and counts.float().std().item() == pytest.approx((n / 2**16) ** 0.5, rel=0.05)


def test_a_slice_has_the_bits_of_its_place_in_the_whole() -> None:
    whole = torch.zeros(4, 6, 10)
    expected = bits_of(Draw("a", (0, 0, 0), whole.shape), whole)[1:3, 2:, 5:9]
    assert torch.equal(bits_of(Draw("a", (1, 2, 5), whole.shape), whole[1:3, 2:, 5:9]), expected)


def test_stretches_make_up_the_whole() -> None:
    """More than a CPU works on at once: rows and blocks at their places, against all at once."""
    shape = torch.Size([3, 70, IN_CACHE // 64 + 10])
    value, draw = drawn(0, *shape), Draw("a", (0, 0, 0), shape)
    kept = Rounded(torch.empty(shape, dtype=torch.bfloat16))
    kept.write(value, draw)
    assert torch.equal(kept.read(), in_bfloat16(value, bits_of(draw, value)).float())
    codes, scales = torch.empty(shape, dtype=torch.uint8), torch.empty(3, 70, -(-shape[-1] // NUMBERS_PER_SCALE))
    blocks = InBlocks(codes, scales, signed=True)
    blocks.write(value, draw)
    expected = decoded(*to_eight_bits(value.view(-1, shape[-1]), signed=True), signed=True)
    assert torch.equal(blocks.read(), expected.view(shape))


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    n = 20_000
    for number in (1.001, -0.7003, 3e-5, 1.0, 0.0, -2.5):
        found = in_bfloat16(torch.full((n,), number), bits(n)).double()
        low = torch.tensor(number).to(torch.bfloat16)
        gap = 2.0**-7 * abs(number)
        assert (found - number).abs().max() <= gap and len(found.unique()) <= 2
        assert found.mean().item() == pytest.approx(number, abs=4 * gap / n**0.5)
        assert low.item() != torch.tensor(number).item() or (found == number).all()


def dynamic_map(signed: bool) -> list[float]:
    """The numbers of dynamic quantisation from 0 up: means of neighbours on even grids from 0.1 to 1, a decade each."""
    found = [0.0]
    for decade in range(7):
        grid = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        found += ((grid[:-1] + grid[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    return found


@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers_of_eight_bits(signed: bool) -> None:
    found, expected = magnitudes(signed), dynamic_map(signed)
    assert len(found) == (128 if signed else 256) and found[-1] == 1.0
    n = len(found) - 1
    assert found[:n] == pytest.approx(expected[:n]) and all(a < b for a, b in pairwise(found))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("columns", [1, 255, 256, 700])
def test_a_number_becomes_the_nearest_of_its_block_to_12_bits(signed: bool, columns: int) -> None:
    value = drawn(0, 3, columns) * 10.0 ** drawn(1, 3, columns)
    value = value if signed else value.square()
    value[1] = 0.0
    codes, scales = to_eight_bits(value, signed=signed)
    assert codes.dtype == torch.uint8 and scales.shape == (3, -(-columns // NUMBERS_PER_SCALE))
    found = decoded(codes, scales, signed=signed)
    for row in range(3):
        for first in range(0, columns, NUMBERS_PER_SCALE):
            block, here = value[row, first : first + NUMBERS_PER_SCALE], found[row, first : first + NUMBERS_PER_SCALE]
            table = block.abs().max() * torch.tensor(magnitudes(signed))
            shares = (block.abs() / block.abs().max().clamp(min=1e-38)).double()
            exponents = shares.frexp().exponent - 12
            shares = (shares.ldexp(-exponents).ceil() - 0.5).ldexp(exponents).where(block != 0, 0)
            nearest = (shares.unsqueeze(-1) - torch.tensor(magnitudes(signed))).abs().argmin(-1)
            nearest = nearest if signed else nearest.clamp(min=1).where(block > 0, 0)
            torch.testing.assert_close(here, table[nearest] * block.sign(), rtol=1e-6, atol=0)
    assert signed or torch.equal(found > 0, value > 0)


def fit(dtype: torch.dtype, config: Optimizer.Config, steps: int = 150) -> float:
    """The loss of a linear map after steps of full batches, from 1 at zero weights."""
    x, target = drawn(0, 256, 32), drawn(1, 32, 24)
    weight = nn.Parameter(torch.zeros(24, 32, dtype=dtype))
    optimizer = built(config, weight)
    loss = torch.zeros(())
    for step in range(1, steps + 1):
        loss = (x @ weight.float().T - x @ target).square().mean() / 32
        weight.grad = None
        loss.backward()
        optimizer.step(1 - step / (steps + 1), step)
    return loss.item()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8-bit"])
@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_few_bits_learn_as_much(kind: Any, state_dtype: Any) -> None:
    config = kind.Config(lr=0.1, weight_decay=0.0, state_dtype=state_dtype)
    expected = 1.2 * fit(torch.float32, kind.Config(lr=0.1, weight_decay=0.0)) + 3e-4
    assert fit(torch.float32, config) < expected and fit(torch.bfloat16, config) < expected


def test_a_norm_near_one_moves_in_bfloat16() -> None:
    """Steps of 1e-3 are less than half of one of bfloat16 below 1: PyTorch's optimizer loses every one of them."""
    ours, theirs = (nn.Parameter(torch.ones(4000, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = built(AdamW.Config(lr=1e-3, weight_decay=0.0), ours)
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for step in range(1, 51):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        optimizer.step(1.0, step)
        reference.step()
    assert (theirs == 1).all()
    assert ours.float().mean().item() == pytest.approx(1 - 50e-3, abs=1e-3)


def test_what_is_kept_and_under_which_names() -> None:
    matrix, vector = nn.Parameter(drawn(0, 6, 300)), nn.Parameter(drawn(0, 6))
    eight = AdamW.Config(state_dtype="8-bit")
    kept = built(eight, matrix).state["w.weight"]
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    codes, scales = (torch.uint8, (6, 300)), (torch.float32, (6, 2))
    moments = {"exp_avg": codes, "exp_avg_scale": scales, "exp_avg_sq": codes, "exp_avg_sq_scale": scales}
    assert shapes == {"step": (torch.float32, ()), **moments}
    assert {tensor.dtype for tensor in built(eight, vector).state["w.weight"].values()} == {torch.float32}
    half = built(AdamW.Config(state_dtype="bfloat16"), vector).state["w.weight"]
    assert {name: tensor.dtype == torch.bfloat16 for name, tensor in half.items()} == {
        "step": False,
        "exp_avg": True,
        "exp_avg_sq": True,
    }


def test_copies_are_made_of_few_weights_at_once() -> None:
    shapes = [(2, AT_ONCE // 4), (2, AT_ONCE // 4), (1, 3), (2, AT_ONCE), (1, 3)]
    named = [
        Weight(f"{i}.weight", nn.Parameter(torch.empty(shape, device="meta")), ("ffn", "embed"), Constant(0.0))
        for i, shape in enumerate(shapes)
    ]
    for dtype, expected in (("bfloat16", [[0, 1, 2], [3], [4]]), ("weights", [[0, 1, 2, 3, 4]])):
        config = AdamW.Config(state_dtype=dtype)  # pyrefly: ignore[bad-argument-type]
        optimizer: Optimizer = config.build(weights=named, layout=SingleRank(torch.device("meta")))
        found = updated_at_once(list(optimizer.weights.values()))
        assert [[int(weight.name[0]) for weight in batch] for batch in found] == expected


def test_blocks_that_a_layout_would_cut_are_refused() -> None:
    run = Trainer.Config(model=Toy.Config(), parallelism=Parallelism(tensor_parallel_degree=2))
    check_blocks(run, meta_model(run.model))
    run.optimizer.state_dtype = "8-bit"
    with pytest.raises(UserError, match="tensor_parallel_degree 2 cuts the 32 columns of layers.0.attention.wo.weight"):
        check_blocks(run, meta_model(run.model))
    run.model.attention.head_dim, run.model.feed_forward.hidden_dim = 128, 512
    check_blocks(run, meta_model(run.model))
