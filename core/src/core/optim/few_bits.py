"""Weights and states in few bits: what is kept, and what an update works on in fp32 for as long as it runs.

bfloat16 has 8 bits of a number: half a step near 1 is 0.002, and a smaller update, rounded to nearest, is lost every
time. Rounded stochastically, up as often as the lost bits say, it is right on average. The draw is a hash of the
name, the step and the place in the whole tensor: a run repeats itself, goes on as it was, and rounds equally in every
layout, and no state of a generator is saved. It mixes the sum of a hash of the row and one of the column: those of
rows and columns are few, and the mixing is short.

Eight bits are one of 256 numbers between -1 and 1, times the largest number of a block of 256 in a row of the whole
tensor. They lie denser towards 0, over seven decades (dynamic quantisation, arXiv:2110.02861), so that small numbers
beside large ones keep a digit. Of a state that is never negative all 256 are positive, and only 0 itself becomes 0: it
is divided by. Which one is nearest to a share is looked up by its exponent and the 11 bits that follow.

On a CPU all of it is done for as many rows at a time as stay in the cache.

Letters: R rows, all axes but the last together; C columns; B blocks of a row.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache, lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

NUMBERS_PER_SCALE = 256
"""Numbers of a row that share a scale."""
IN_CACHE, AT_ONCE = 2**17, 2**24
"""Numbers that stay in the cache of a CPU with what is computed of them, and those whose copies hardly matter."""
_SPARE = 12
"""Bits at the end of a share, in fp32, that do not count."""

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
        rows_R, columns_C = hashes(draw, value)
        kept_RC, value_RC = as_matrix(self.tensor).view(torch.int16), as_matrix(value)
        for rows in cached_rows(value_RC):
            kept_RC[rows] = rounded(value_RC[rows], random_bits(rows_R[rows], columns_C))


class InBlocks(Kept):
    """A slice in eight bits: codes of its shape, and the scales of blocks of its rows."""

    def __init__(self, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
        """`codes` (..., C), `scales` (..., ceil(C / 256))."""
        self.codes, self.scales, self.signed = codes, scales, signed

    def read(self) -> Tensor:
        value = torch.empty_like(self.codes, dtype=torch.float32)
        value_RC, codes_RC, scales_RB = map(as_matrix, (value, self.codes, self.scales))
        for rows in cached_rows(value_RC):
            from_eight_bits(codes_RC[rows], scales_RB[rows], signed=self.signed, out=value_RC[rows])
        return value

    def write(self, value: Tensor, draw: Draw) -> None:
        value_RC, codes_RC, scales_RB = map(as_matrix, (value, self.codes, self.scales))
        for rows in cached_rows(value_RC):
            codes_RC[rows], scales_RB[rows] = to_eight_bits(value_RC[rows], signed=self.signed)


def as_matrix(tensor: Tensor) -> Tensor:
    """A view (R, C) of a tensor (..., C)."""
    return tensor.view(prod(tensor.shape[:-1]), tensor.shape[-1])


def at_once(tensor: Tensor) -> int:
    """How many numbers of a tensor, of any shape, are worked on at once. One of a plan has no memory, and no cache."""
    return IN_CACHE if tensor.device.type == "cpu" and type(tensor) is Tensor else AT_ONCE


def cached_rows(value_RC: Tensor) -> Iterator[slice]:
    """Rows that are worked on at once."""
    n, columns = value_RC.shape
    step = max(at_once(value_RC) // max(columns, 1), 1)
    return (slice(first, first + step) for first in range(0, n, step))


def hashes(draw: Draw, like: Tensor) -> tuple[Tensor, Tensor]:
    """32 bits in int32 for each row (R,) and for each column (C,) of a slice `like` (..., C)."""
    key = int.from_bytes(hashlib.sha256(draw.text.encode()).digest()[:4], "little", signed=True)
    rows_R, columns_C = place_hashes(draw.start, like.shape, draw.shape, like.device)
    return rows_R + key, columns_C


@lru_cache(maxsize=64)
def place_hashes(
    start: tuple[int, ...], shape: torch.Size, whole: torch.Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """32 bits in int32 for each row (R,) and each column (C,) of a slice of this shape, which begins there."""
    with _disable_current_modes():
        place = torch.zeros((), dtype=torch.int64)
        ranges = [torch.arange(first, first + n) for first, n in zip(start, shape, strict=True)]
        for each, n in zip(ranges[:-1], whole[:-1], strict=True):
            place = place.unsqueeze(-1) * n + each
        return mixed(place.flatten(), 1).to(device), mixed(ranges[-1], 2).to(device)


def mixed(place: Tensor, key: int) -> Tensor:
    """32 bits in int32 of places (n,) in int64, by the mixing of SplitMix64 (its constants, which int64 wraps)."""
    x = place + key * 0x1E3779B97F4A7C15
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)).to(torch.int32)


def random_bits(rows_R: Tensor, columns_C: Tensor) -> Tensor:
    """16 random bits in int32 for each number (R, C) of rows and columns with these hashes in int32."""
    x_RC = rows_R.unsqueeze(-1) + columns_C
    return x_RC.bitwise_xor_(x_RC >> 16).mul_(0x7FEB352D).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def rounded(value: Tensor, bits: Tensor) -> Tensor:
    """The bits of `value`, of any shape in fp32, in bfloat16, in int32: rounded away from 0 where 16 random `bits` and
    those that are cut off carry. `bits` are used up."""
    return bits.add_(value.view(torch.int32)).bitwise_right_shift_(16)


@cache
def magnitudes(signed: bool) -> tuple[float, ...]:
    """The numbers from 0 to 1 that eight bits stand for, or seven beside a sign: 0, the midpoints of ever finer parts
    of each decade from 1e-7 on, and 1."""
    found = [0.0]
    for decade in range(7):
        n = 2 ** (decade + (not signed))
        found += [10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / n) for i in range(n)]
    return (*(found[:-1] if signed else found), 1.0)


@cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """What the 256 codes stand for, in fp32; the second half of signed ones is negative."""
    with _disable_current_modes():  # that of a plan, in which tensors have no numbers
        found = torch.tensor(magnitudes(signed), dtype=torch.float32)
        return (torch.cat([found, -found]) if signed else found).to(device)


@cache
def nearest_codes(signed: bool, device: torch.device) -> Tensor:
    """The code of every share, by its sign, exponent and the 11 bits that follow, rounded up: that of the number which
    is nearest to the midpoint of those that have these."""
    with _disable_current_modes():
        found = torch.tensor(magnitudes(signed))
        places = torch.arange(1, 2 ** (31 - _SPARE), dtype=torch.int32)
        middles = ((places << _SPARE) - 2 ** (_SPARE - 1)).view(torch.float32)
        codes = torch.bucketize(middles, (found[1:] + found[:-1]) / 2).clamp(min=0 if signed else 1)
        codes = torch.cat([codes.new_zeros(1), codes])
        return torch.cat([codes, codes + 128 * signed]).to(torch.uint8).to(device)


def to_eight_bits(value_RC: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes (R, C) of these numbers in uint8, and the scales (R, B) of their blocks."""
    blocks_RBK = blocks_of_rows(value_RC)
    sizes_RBK = blocks_RBK.abs() if signed else blocks_RBK
    scales_RB = sizes_RBK.amax(-1) if sizes_RBK.numel() else sizes_RBK.new_zeros(sizes_RBK.shape[:-1])
    shares_RBK = blocks_RBK / scales_RB.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    places = shares_RBK.view(torch.int32).add_(2**_SPARE - 1).bitwise_right_shift_(_SPARE)
    places = places.bitwise_and_(2 ** (32 - _SPARE) - 1)
    codes = nearest_codes(signed, value_RC.device).index_select(0, places.flatten())
    return codes.view(len(value_RC), -1)[:, : value_RC.shape[1]], scales_RB


def from_eight_bits(codes_RC: Tensor, scales_RB: Tensor, *, signed: bool, out: Tensor) -> None:
    """Write into `out` (R, C) the numbers in fp32 of codes in uint8 and the scales of their blocks."""
    torch.index_select(code_values(signed, codes_RC.device), 0, codes_RC.flatten().int(), out=out.view(-1))
    whole = codes_RC.shape[1] // NUMBERS_PER_SCALE
    end = whole * NUMBERS_PER_SCALE
    out[:, :end].unflatten(1, (whole, NUMBERS_PER_SCALE)).mul_(scales_RB[:, :whole, None])
    out[:, end:].mul_(scales_RB[:, whole:])


def blocks_of_rows(rows_RC: Tensor) -> Tensor:
    """The blocks (R, B, 256) of rows, filled up with zeros where these do not end with one."""
    (n, columns), each = rows_RC.shape, NUMBERS_PER_SCALE
    count = -(-columns // each)
    padded = rows_RC if columns == count * each else torch.nn.functional.pad(rows_RC, (0, count * each - columns))
    return padded.view(n, count, each)
