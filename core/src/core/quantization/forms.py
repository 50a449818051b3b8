"""Forms that numbers take before a matrix product: which numbers of few bits they become, with which scales.

A form is known by its name, so that an operation can be told it:

    e4m3_tensorwise  e5m2_tensorwise  8 bits; one scale for a tensor, whose largest number becomes the largest there is
    e4m3_rowwise                      8 bits; a power of two for each row
    mxfp8  mxfp8_floor  mxfp8_e5m2    8 bits; a power of two (e8m0) for each 32 numbers of a row (OCP MX 1.0)
    mxfp4                             4 bits (e2m1), the same
    nvfp4                             4 bits; a scale in e4m3 for each 16 numbers, and one in fp32 for the tensor
    nvfp4_square                      the same with a scale for each 16 rows of 16 numbers

Rows lie along the dimension that a product sums over. Letters: M rows, K the numbers of a row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EXPONENTS = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}
"""Whole numbers of as many bits, and which of them are the exponent: alone they are a power of two."""
SMALLEST_AMAX = 1e-12
"""What a maximum counts as at least, so that zeros have a scale."""


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """Which numbers a tensor's become."""

    whole: bool = False
    """Its scale needs the largest absolute number of the whole tensor."""
    block: int = 1
    """Numbers of a row that share a scale; a row may end within a block."""

    @abstractmethod
    def quantised(self, x: Tensor, amax: Tensor | None) -> Tensor:
        """The numbers that those of x (..., K), in fp32 or fp64, become; `amax` is the largest, where it is `whole`."""


FORMS: dict[str, Form] = {}
"""All forms by name. A file of one's own may add to them when it is imported."""


@dataclass(frozen=True, kw_only=True)
class Float8(Form):
    """Numbers of 8 bits, with a scale for a tensor, or a power of two for a row."""

    dtype: torch.dtype

    def quantised(self, x: Tensor, amax: Tensor | None) -> Tensor:
        bits, scale = self.encoded(x, amax)
        return bits.to(x.dtype) / scale

    def encoded(self, x: Tensor, amax: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (..., K) times its scale as numbers of 8 bits, and the scale in fp32: of the tensor, or (..., 1)."""
        if self.whole:
            assert amax is not None, "the scale of a whole tensor needs its largest number"
            scale = scale_of(amax, self.dtype)
        else:
            largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
            scale = power_below(scale_of(largest, self.dtype))
        return cut_to(x * scale, self.dtype), scale


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors in fp32 that make absolute maxima, of any shape, the largest number of `dtype`."""
    return (torch.finfo(dtype).max / amax.double().clamp(min=SMALLEST_AMAX)).float()


def cut_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x of any shape as numbers of a type of 8 bits; those beyond its largest become that."""
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


def power_below(x: Tensor) -> Tensor:
    """The largest powers of two that are not above the size of numbers of any shape, in fp32 or fp64; inf of what is no
    number, and 0 of what is below the normal ones."""
    bits, exponent = EXPONENTS[x.dtype]
    return (x.view(bits) & exponent).view(x.dtype)


def in_blocks(x: Tensor, size: int) -> Tensor:
    """The rows of x (..., K) as blocks (..., ceil(K / size), size), zeros behind a last one that is not full."""
    missing = -x.shape[-1] % size
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))


def in_rows(blocks: Tensor, width: int) -> Tensor:
    """Rows (..., width) of blocks (..., blocks, size)."""
    return blocks.flatten(-2)[..., :width]


@dataclass(frozen=True, kw_only=True)
class Microscaled(Form):
    """Blocks with a power of two as scale: e8m0, from 2^-127 to 2^127 (OCP MX 1.0, section 6.3).

    The exponent is that of the block's largest number less that of the largest there is, so that some of the block may
    lie above that, and become it; with `up` the least power of two for which none does (the way of NVIDIA's kernels).
    """

    block: int = 32
    dtype: torch.dtype | None
    """Of 8 bits; None is e2m1, of 4."""
    up: bool = False
    stochastic: bool = False
    """Numbers between two of e2m1 become either, the nearer the likelier, so that the mean stays."""

    def quantised(self, x: Tensor, amax: Tensor | None) -> Tensor:
        blocks = in_blocks(x, self.block)
        scale = torch.ldexp(torch.ones_like(blocks[..., :1]), self.exponents(blocks))
        scaled = blocks / scale
        numbers = e2m1(scaled, self.stochastic) if self.dtype is None else cut_to(scaled, self.dtype).to(x.dtype)
        return in_rows(numbers * scale, x.shape[-1])

    def exponents(self, blocks: Tensor) -> Tensor:
        """The exponents (..., blocks, 1) of the scales of blocks (..., blocks, size)."""
        top = 6.0 if self.dtype is None else torch.finfo(self.dtype).max
        amax = blocks.abs().amax(-1, keepdim=True)
        if self.up:
            mantissa, exponent = torch.frexp(amax / top)
            exponent = exponent - (mantissa == 0.5).int()
        else:
            exponent = torch.frexp(amax).exponent - torch.frexp(torch.tensor(top)).exponent
        return exponent.clamp(-127, 127).where(amax > 0, -127)


def e2m1(x: Tensor, stochastic: bool = False) -> Tensor:
    """The numbers of 4 bits that those of x, of any shape, become: 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign.

    The nearest, of two equally near the even one, or by `stochastic` chance; all beyond 6 become it.
    """
    step = 0.5 * power_below(x).clamp(1.0, 4.0)
    steps = x.clamp(-6.0, 6.0) / step
    if stochastic:  # by less than 1 also where the sum is rounded
        return torch.floor(steps + torch.rand_like(steps).clamp_(max=1 - 2**-22)) * step
    return torch.round(steps) * step


@dataclass(frozen=True, kw_only=True)
class NVFP4(Form):
    """Blocks of 16 numbers of 4 bits with a scale in e4m3, and a scale in fp32 for the tensor that makes the largest
    of those the largest of e4m3 (arXiv:2509.25149)."""

    block: int = 16
    whole: bool = True
    stochastic: bool = False
    square: bool = False
    """A block is 16 rows of 16 numbers: those of a matrix (..., M, K) and of its transpose become the same."""

    def quantised(self, x: Tensor, amax: Tensor | None) -> Tensor:
        assert amax is not None, "the scale of a whole tensor needs its largest number"
        fp8, blocks = torch.finfo(torch.float8_e4m3fn), in_blocks(x, self.block)
        tensor_scale = (amax.double().clamp(min=SMALLEST_AMAX) / (fp8.max * 6.0)).float()
        largest = blocks.abs().amax(-1, keepdim=True)
        wanted = (self.of_square(largest) if self.square else largest) / 6.0 / tensor_scale
        block_scale = wanted.clamp(fp8.tiny, fp8.max).to(torch.float8_e4m3fn).to(x.dtype)
        numbers = e2m1(blocks * ((1.0 / tensor_scale) / block_scale), self.stochastic)
        return in_rows(numbers * (block_scale * tensor_scale), x.shape[-1])

    def of_square(self, largest: Tensor) -> Tensor:
        """The largest numbers (..., M, blocks, 1) of rows of blocks as those of all rows that share a scale."""
        n_rows = largest.shape[-3]
        shared = in_blocks(largest.squeeze(-1).mT, self.block).amax(-1)
        return shared.repeat_interleave(self.block, -1)[..., :n_rows].mT.unsqueeze(-1)


def rotated(x: Tensor) -> Tensor:
    """Each 16 numbers of the rows of x (..., K) turned by a Hadamard matrix with fixed random signs: outliers spread
    over all 16, and a product of two that are turned is that of the two (arXiv:2509.25149)."""
    matrix = HADAMARD.to(x.device, x.dtype)
    return (in_blocks(x, len(matrix)) @ matrix).flatten(-2)


def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1, device="cpu")
    for _ in range(4):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], device="cpu")
    return signs.unsqueeze(1) * matrix / 4.0


HADAMARD = _hadamard()
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMS |= {
    "e4m3_tensorwise": Float8(dtype=E4M3, whole=True),
    "e5m2_tensorwise": Float8(dtype=E5M2, whole=True),
    "e4m3_rowwise": Float8(dtype=E4M3),
    "mxfp8": Microscaled(dtype=E4M3, up=True),
    "mxfp8_floor": Microscaled(dtype=E4M3),
    "mxfp8_e5m2": Microscaled(dtype=E5M2, up=True),
    "mxfp4": Microscaled(dtype=None),
    "mxfp4_stochastic": Microscaled(dtype=None, stochastic=True),
    "nvfp4": NVFP4(),
    "nvfp4_stochastic": NVFP4(stochastic=True),
    "nvfp4_square": NVFP4(square=True),
}
