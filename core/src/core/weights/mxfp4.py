"""Weights written as MXFP4, as GPT-OSS is published: see `core.weights.quantised`, which reads them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.config.errors import UserError
from core.weights.key_map import KeyMap
from core.weights.shard_file import FileSpan, Output

MXFP4_BLOCK = 32
"""Of a block."""
UP_TO_EVEN, UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
"""Halfway between two numbers of e2m1: where the lower one is even, and where the upper one is."""
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def quantization_config() -> dict:
    """What a `config.json` states of experts in MXFP4."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}


def in_mxfp4(made: Sequence[Output], key_map: KeyMap) -> list[Output]:
    """What is written, the matrices of experts as blocks and scales.

    Raises `UserError` for a model that is not published so, or whose sizes are no whole blocks.
    """
    stacked = {
        piece.key
        for places in key_map.places.values()
        for piece in places[0]
        if piece.stored_row is not None and piece.transposed
    }
    if not stacked:
        raise UserError(f"--mxfp4: {key_map.owner} has no stacks of experts that are published in 4 bits")
    found: list[Output] = []
    for output in made:
        if output.key not in stacked:
            found.append(output)
            continue
        n_experts, n_in, n_out = output.shape
        if n_in % MXFP4_BLOCK:
            raise UserError(f"--mxfp4: {output.key} has {n_in:,} inputs, no multiple of the {MXFP4_BLOCK} of a block")
        shape = [n_experts, n_out, n_in // MXFP4_BLOCK]
        found.append(Output(f"{output.key}_blocks", [*shape, 16], torch.uint8, ExpertBytes(output, "blocks")))
        found.append(Output(f"{output.key}_scales", shape, torch.uint8, ExpertBytes(output, "scales")))
    return found


@dataclass(frozen=True)
class ExpertBytes:
    """Makes the blocks or the scales of a weight (E, 32 G, rows)."""

    weight: Output
    part: Literal["blocks", "scales"]

    def __call__(self) -> Iterator[Tensor]:
        for values in self.weight.make():
            assert not isinstance(values, FileSpan), "experts stand behind one another as they are written"
            yield dict(zip(("blocks", "scales"), to_mxfp4(values), strict=True))[self.part]


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (..., rows, G, 16) and scales (..., rows, G) of a weight (..., 32 G, rows), both uint8 (OCP MX 1.0, 6.3).

    The scale is the power of two of a block's largest number less that of 6, the largest of e2m1.
    """
    blocks = weight.float().mT.unflatten(-1, (-1, MXFP4_BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = (torch.frexp(amax).exponent - 3).clamp(-127, 127).where(amax > 0, -127)
    size = torch.ldexp(blocks.abs(), -exponent)
    passed = [size > edge for edge in UP_TO_EVEN] + [size >= edge for edge in UP]
    code = torch.stack(passed).sum(0, dtype=torch.uint8) + 8 * (blocks < 0).to(torch.uint8)
    return code[..., 0::2] + 16 * code[..., 1::2], (exponent.squeeze(-1) + 127).to(torch.uint8)
