"""Weights and states in few bits: what is kept, and what an update works on in fp32 for as long as it runs.

bfloat16 has 8 bits of a number: half a step near 1 is 0.002, and a smaller update, rounded to nearest, is lost every
time. Rounded stochastically, up as often as the lost bits say, it is right on average. The draw is a hash of the
name, the step and the place in the whole tensor: a run repeats itself, goes on as it was, and rounds equally in every
layout, and no state of a generator is saved.

Eight bits are one of 256 numbers between -1 and 1, times the largest number of a block of 256 in a row of the whole
tensor. They lie denser towards 0, over seven decades (dynamic quantisation, arXiv:2110.02861), so that small numbers
beside large ones keep a digit. Of a state that is never negative all 256 are positive, and only 0 itself becomes 0: it
is divided by.
"""

import hashlib
from abc import ABC, abstractmethod
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NUMBERS_PER_SCALE = 256
"""Numbers of a row that share a scale."""
_MASK = 2**32 - 1


StateDtype = Literal["weights", "float32", "bfloat16", "8-bit"]
"""What states are kept in: the type of their weight, or another."""


class Draw(NamedTuple):
    """Which random bits a slice gets: those of a text, at the places from `start` on in a whole of this shape."""

    text: str
    start: tuple[int, ...]
    shape: torch.Size


class Kept(ABC):
    """This rank's slice of a tensor as it is kept: read for an update, written after it."""

    @abstractmethod
    def read(self) -> Tensor:
        """What an update may change in place, of the slice's shape."""

    @abstractmethod
    def write(self, value: Tensor, draw: Draw) -> None:
        """Keep `value`, of any shape, which is that of the slice."""


class AsItIs(Kept):
    """A slice that updates change itself."""

    def __init__(self, tensor: Tensor) -> None:
        """`tensor` is a slice of any shape."""
        self.tensor = tensor

    def read(self) -> Tensor:
        return self.tensor

    def write(self, value: Tensor, draw: Draw) -> None:
        assert value is self.tensor


class Rounded(Kept):
    """A slice in bfloat16 that an update sees in fp32, rounded stochastically."""

    def __init__(self, tensor: Tensor) -> None:
        """`tensor` is a slice of any shape, in bfloat16."""
        self.tensor = tensor

    def read(self) -> Tensor:
        return self.tensor.float()

    def write(self, value: Tensor, draw: Draw) -> None:
        self.tensor.copy_(rounded(value, random_bits(draw, value)))


class InBlocks(Kept):
    """A slice in eight bits: codes of its shape, and the scales of blocks of its rows."""

    def __init__(self, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
        """`codes` (..., C), `scales` (..., ceil(C / 256))."""
        self.codes, self.scales, self.signed = codes, scales, signed

    def read(self) -> Tensor:
        return from_eight_bits(self.codes, self.scales, signed=self.signed)

    def write(self, value: Tensor, draw: Draw) -> None:
        codes, scales = to_eight_bits(value, signed=self.signed)
        self.codes.copy_(codes)
        self.scales.copy_(scales)


def random_bits(draw: Draw, like: Tensor) -> Tensor:
    """16 random bits in int32 for each number of a slice `like`, of any shape."""
    key = int.from_bytes(hashlib.sha256(draw.text.encode()).digest()[:4], "little")
    place = torch.zeros((), dtype=torch.int64, device=like.device)
    for first, size, whole in zip(draw.start, like.shape, draw.shape, strict=True):
        place = place.unsqueeze(-1) * whole + torch.arange(first, first + size, device=like.device)
    x = (place ^ (place >> 32) ^ key) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # low-bias mixing of 32 bits
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x ^ (x >> 16)) & 0xFFFF).to(torch.int32).expand(like.shape)


def rounded(value: Tensor, bits: Tensor) -> Tensor:
    """`value` in bfloat16, rounded away from 0 where 16 random `bits` and those that are cut off carry; any shape."""
    return ((value.view(torch.int32) + bits) & -65536).view(torch.float32).to(torch.bfloat16)


@cache
def magnitudes(signed: bool) -> tuple[float, ...]:
    """The numbers from 0 to 1 that eight bits stand for, or seven beside a sign: 0, the midpoints of ever finer parts
    of each decade from 1e-7 on, and 1."""
    found = [0.0]
    for decade in range(7):
        n = 2 ** (decade + (not signed))
        found += [10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / n) for i in range(n)]
    return (*(found[:-1] if signed else found), 1.0)


def to_eight_bits(value: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes (..., C) of `value` (..., C) in uint8, and the scales (..., ceil(C / 256)) of its blocks."""
    table = torch.tensor(magnitudes(signed), dtype=torch.float32, device=value.device)
    blocks = _blocks(value)
    scales = blocks.abs().amax(-1) if blocks.numel() else blocks.new_zeros(blocks.shape[:-1])
    shares = (blocks.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).flatten(-2)
    shares = shares[..., : value.shape[-1]].contiguous()
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2)
    codes = codes + 128 * (value < 0) if signed else codes.clamp(min=1).where(value > 0, 0)
    return codes.to(torch.uint8), scales


def from_eight_bits(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers (..., C) in fp32 of these codes (..., C) and scales (..., ceil(C / 256))."""
    table = torch.tensor(magnitudes(signed), dtype=torch.float32, device=codes.device)
    table = torch.cat([table, -table]) if signed else table
    return table[codes.int()] * scales.repeat_interleave(NUMBERS_PER_SCALE, -1)[..., : codes.shape[-1]]


def _blocks(value: Tensor) -> Tensor:
    """The blocks (..., n, 256) of rows (..., C), filled up with zeros."""
    n = -(-value.shape[-1] // NUMBERS_PER_SCALE)
    padded = torch.nn.functional.pad(value, (0, n * NUMBERS_PER_SCALE - value.shape[-1]))
    return padded.view(*value.shape[:-1], n, NUMBERS_PER_SCALE)
