"""Weights that were published in few bits, decoded as they are read.

MXFP4 (GPT-OSS; OCP Microscaling Formats 1.0): `X_blocks` (..., rows, G, 16) and `X_scales` (..., rows, G), both uint8,
are X (..., 32 G, rows). A byte is two 4-bit floats, the first in its low half; 32 of them times 2^(scale - 127) are 32
values.

8 bits (DeepSeek-V3): `X` (..., rows, columns) in float8_e4m3fn and `X_scale_inv`, the factors of its blocks of
128 x 128, the last ones being what is left.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from core.checkpoint.index import FLOATS
from core.weights.shard_file import Header

BLOCK = 128
EIGHT_BITS = "F8_E4M3"
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
PAIRS = torch.stack((FP4.repeat(16), FP4.repeat_interleave(16)), dim=1)
"""The two numbers in every byte (256, 2)."""
POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
"""The factor of every scale (256)."""
OTHER = {"_blocks": "_scales", "_scales": "_blocks", "_scale_inv": ""}
"""Endings of keys, and the ending that belongs to each."""


class EncodedWeight(NamedTuple):
    """A weight as it is stored: `decode` makes it from the tensors under these keys, or a row of it from their rows."""

    keys: tuple[str, ...]
    shape: list[int]
    dtype: torch.dtype
    """The type that holds its values; bfloat16 for those of fewer bits."""
    decode: Callable[..., Tensor]
    problem: str
    """What is wrong with how it is stored, as words behind the first key; "" if nothing is."""
    blocks: tuple[int, ...] = (1,)
    """How many of its rows a row of the tensor under each key is for; none where rows are not decoded by themselves."""


def stored_weights(headers: Mapping[str, Header]) -> dict[str, EncodedWeight]:
    """The weights by key."""
    given: dict[str, list[str]] = {}
    for key in sorted(headers):
        suffix = next((suffix for suffix in OTHER if key.endswith(suffix)), "")
        given.setdefault(key.removesuffix(suffix), []).append(suffix)
    return {name: stored_weight(name, suffixes, headers) for name, suffixes in given.items()}


def stored_weight(name: str, suffixes: list[str], headers: Mapping[str, Header]) -> EncodedWeight:
    """The weight of this name, for which there are tensors with these suffixes."""
    keys = tuple(name + suffix for suffix in suffixes)
    first, last = headers[keys[0]], headers[keys[-1]]
    shape, dtype, decode, blocks = first.shape, torch.bfloat16, as_stored, (1,)
    if suffixes == [""]:
        dtype = FLOATS.get(first.dtype, dtype)
        needs = f"needs {name}_scale_inv" if first.dtype == EIGHT_BITS else f"is none of {', '.join(FLOATS)}"
        problem = "" if first.dtype in FLOATS else f"is stored as {first.dtype}, which {needs}"
    elif suffixes == ["", "_scale_inv"]:
        decode, blocks = scaled, (1, BLOCK) if len(shape) == 2 else ()
        problem = misfit(first, last, EIGHT_BITS, blocks_of(shape))
    elif suffixes == ["_blocks", "_scales"]:
        decode, blocks = mxfp4, ()
        problem = misfit(first, last, "U8", shape[:-1])
        if shape[2:] and shape[-1] == 16:
            shape = [*shape[:-3], shape[-2] * 32, shape[-3]]
        else:
            problem = f"has shape {shape}, which does not end in rows, groups and 16 bytes"
    elif len(suffixes) == 1:
        problem = f"has no {name}{OTHER[suffixes[0]]}"
    else:
        problem = f"cannot stand beside {' and '.join(keys[1:])}"
    return EncodedWeight(keys, shape, dtype, decode, problem, blocks)


def as_stored(weight: Tensor) -> Tensor:
    """The weight itself, of any shape."""
    return weight


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weight (..., 32 G, rows) of blocks (..., rows, G, 16) and scales (..., rows, G), in fp32."""
    values = embedding(blocks.int(), PAIRS).flatten(-2)
    return values.mul_(POWERS[scales.int(), None]).flatten(-2).mT


def scaled(weight: Tensor, factors: Tensor) -> Tensor:
    """The weight (O, I) in fp32, every block times its factor."""
    out = weight.float()
    columns = factors.float().repeat_interleave(BLOCK, -1)[..., : out.shape[-1]]
    for i, rows in enumerate(out.split(BLOCK, dim=-2)):
        rows.mul_(columns[..., i : i + 1, :])
    return out


def blocks_of(shape: list[int]) -> list[int]:
    """How many blocks a weight of this shape has along each of its axes; only the last two are cut."""
    return [*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:])]


def misfit(weight: Header, scales: Header, dtype: str, shape: list[int]) -> str:
    """What is wrong with a weight that must have this type, and scales that must have this shape; "" if nothing is."""
    if weight.dtype != dtype:
        return f"is stored as {weight.dtype}, but its scales are for {dtype}"
    return "" if scales.shape == shape else f"has scales of shape {scales.shape}, it needs {shape}"
