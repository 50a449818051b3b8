"""Layers as somebody writes them outside of core: no word about ranks."""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.nn.decoder import Block
from core.nn.layers import Linear
from core.nn.start import Normal
from core.testing.toy import Toy


def in_8_bits(x: Tensor, *, scale: float) -> Tensor:
    """The nearest numbers that e4m3 has at a scale; the gradient passes by them as if they were x."""
    return x + ((x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale - x).detach()


class EightBitLinear(Linear):
    """A Linear whose weight and input have 8 bits; its own forward takes the input, its parent's the product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_8_bits(x, scale=8.0), in_8_bits(self.weight, scale=64.0), self.bias)


class Clipped(EightBitLinear):
    """The same of an input that is held within -4 and 4."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-4.0, 4.0))


def clipped(linear: Linear) -> Clipped:
    """The layer that takes the place of a Linear: a converter's work."""
    n_out, n_in = linear.weight.shape
    (std, _), bias = Normal(*linear.start["weight"]), linear.bias is not None
    return Clipped(n_in, n_out, std=std, bias=bias)


def doubled(linear: Linear, x: Tensor) -> Tensor:
    """A forward that somebody puts in the place of a layer's own."""
    return F.linear(x, 2.0 * linear.weight, linear.bias)


class EightBit(Toy):
    """A toy whose attention has such layers; of its network one has a forward replaced, and one wrapped."""

    @dataclass(kw_only=True, slots=True)
    class Config(Toy.Config):
        pass

    def block(self, i: int) -> Block:
        block: Any = super().block(i)
        for name in ("wq", "wk", "wv", "wo"):
            setattr(block.attention, name, clipped(getattr(block.attention, name)))
        network = block.feed_forward
        network.w1.forward = MethodType(doubled, network.w1)
        inner = network.w2.forward
        network.w2.forward = lambda x: inner(x) * 0.5
        return block
