"""The numbers of few bits that forms make, against the formats by definition, number by number in fp64."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from core.quantization.forms import FORMS, HADAMARD, e2m1, rotated


def values(exponent_bits: int, mantissa_bits: int, *, top: float) -> list[float]:
    """All numbers of a small floating-point format that are not negative, up to the largest that is a number."""
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for e, m in product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = m / 2**mantissa_bits
        found.append(fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias))
    return sorted(number for number in found if number <= top)


E4M3, E5M2, E2M1 = values(4, 3, top=448.0), values(5, 2, top=57344.0), values(2, 1, top=6.0)


def nearest(x: float, numbers: list[float]) -> float:
    """The nearest of the numbers, which are every even and odd in turn: of two equally near the even one."""
    size = min(abs(x), numbers[-1])
    best = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - size), i % 2))
    return math.copysign(numbers[best], x)


def drawn(rows: int, width: int) -> Tensor:
    """Numbers over many orders of magnitude, with zeros, and a row of zeros."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator) * 2.0 ** torch.randint(-12, 9, (rows, width), generator=generator)
    x[:, ::7], x[-1] = 0.0, 0.0
    return x


def microscaled(row: list[float], numbers: list[float], *, up: bool) -> list[float]:
    """A row by the words of OCP MX 1.0, 6.3: blocks of 32, a power of two each."""
    found = []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        amax = max(map(abs, block))
        if amax == 0:
            found += block
            continue
        exponent = math.floor(math.log2(amax)) - math.floor(math.log2(numbers[-1]))
        if up:
            exponent = next(n for n in range(-127, 128) if amax / 2.0**n <= numbers[-1])
        found += [nearest(x / 2.0**exponent, numbers) * 2.0**exponent for x in block]
    return found


@pytest.mark.parametrize(
    ("name", "numbers", "up"),
    [("mxfp8", E4M3, True), ("mxfp8_floor", E4M3, False), ("mxfp8_e5m2", E5M2, True), ("mxfp4", E2M1, False)],
)
def test_blocks_are_those_of_the_standard(name: str, numbers: list[float], up: bool) -> None:
    x = drawn(6, 80)  # the last block of a row is half full
    expected = torch.tensor([microscaled(row, numbers, up=up) for row in x.tolist()])
    assert torch.equal(FORMS[name].quantised(x, None), expected)


def test_tensorwise_and_rowwise() -> None:
    x = drawn(5, 48)
    scale = torch.tensor(448.0 / x.abs().max().item()).item()
    expected = [[nearest(torch.tensor(v).mul(scale).item(), E4M3) for v in row] for row in x.tolist()]
    found = FORMS["e4m3_tensorwise"].quantised(x, x.abs().max())
    assert torch.equal(found, torch.tensor(expected) / scale)
    found = FORMS["e4m3_rowwise"].quantised(x, None)
    for row, got in zip(x.tolist(), found, strict=True):
        amax = max(max(map(abs, row)), 1e-12)
        scale = 2.0 ** math.floor(math.log2(torch.tensor(448.0 / amax).item()))
        assert got.tolist() == [nearest(v * scale, E4M3) / scale for v in row]


def test_nvfp4() -> None:
    x = drawn(4, 48)
    tensor_scale = (x.abs().max().double() / (448 * 6)).float()
    for row, got in zip(x, FORMS["nvfp4"].quantised(x, x.abs().max()), strict=True):
        for block, numbers in zip(row.split(16), got.split(16), strict=True):
            wanted = (block.abs().max() / 6 / tensor_scale).clamp(2.0**-6, 448.0).item()
            scale = torch.tensor(nearest(wanted, E4M3))
            steps = (block * ((1.0 / tensor_scale) / scale)).tolist()
            expected = torch.tensor([nearest(v, E2M1) for v in steps]) * (scale * tensor_scale)
            assert torch.equal(numbers, expected)


@pytest.mark.parametrize(("rows", "width"), [(32, 48), (20, 40)])  # the second ends within blocks both ways
def test_square_blocks_of_nvfp4(rows: int, width: int) -> None:
    """Each is what a row would be that had all its numbers and no others; the transpose has the same numbers."""
    x = drawn(rows, width)
    found, amax = FORMS["nvfp4_square"].quantised(x, x.abs().max()), x.abs().max()
    for i in range(0, rows, 16):
        for j in range(0, width, 16):
            square = x[i : i + 16, j : j + 16]
            largest = square.abs().max()
            for row, got in zip(square, found[i : i + 16, j : j + 16], strict=True):
                with_largest = torch.stack([FORMS["nvfp4"].quantised(torch.stack((v, largest)), amax) for v in row])
                assert torch.equal(got, with_largest[:, 0])
    assert torch.equal(FORMS["nvfp4_square"].quantised(x.t(), amax), found.t())
    stack = torch.stack((x, 0.25 * x))
    assert torch.equal(FORMS["nvfp4_square"].quantised(stack, amax)[0], found)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "nvfp4_square", "e4m3_tensorwise", "e4m3_rowwise"])
def test_what_is_not_finite_is_seen(name: str) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = torch.nan
    amax = x.abs().max() if FORMS[name].whole else None
    assert FORMS[name].quantised(x, amax)[0, 3].isnan()
    assert FORMS[name].quantised(torch.empty(0, 64), torch.zeros(())).shape == (0, 64)


def test_stochastic_rounding_keeps_the_mean() -> None:
    x = torch.linspace(-6.5, 6.5, 53).repeat(20_000, 1)
    torch.manual_seed(0)
    found = e2m1(x, stochastic=True)
    neighbours = torch.tensor(sorted({sign * v for v in E2M1 for sign in (1, -1)}))
    assert torch.isin(found, neighbours).all()
    assert ((found - x.clamp(-6, 6)).abs() < 2.0).all()
    error = (found.mean(0) - x[0].clamp(-6, 6)).abs()
    assert error.max() < 5 * 1.0 / math.sqrt(20_000)  # five deviations of a mean of numbers at most 2 apart


def test_numbers_of_4_bits_stay_what_they_are_by_any_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the largest that is drawn, which fp32 would round to the next whole number when it is added."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2**-24))
    numbers = torch.tensor([sign * number for number in E2M1 for sign in (1, -1)])
    assert torch.equal(e2m1(numbers, stochastic=True), numbers)


def test_turned_operands_have_the_same_product() -> None:
    a, b = torch.randn(3, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    torch.testing.assert_close(rotated(a) @ rotated(b).T, a @ b.T)
    assert torch.equal(HADAMARD @ HADAMARD.T, torch.eye(16)) and set(HADAMARD.unique().tolist()) == {-0.25, 0.25}
    spike = torch.zeros(1, 16)
    spike[0, 5] = 8.0
    assert (rotated(spike).abs() == 2.0).all()
