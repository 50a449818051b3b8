"""Rotary position embedding (arXiv:2104.09864) in both layouts, with llama and YaRN frequency scaling.

Letters: B rows, L length, N heads, H head width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.config.configurable import Configurable
from core.nn.module import Module, cpu_forms, inference_forms


class Rotation(NamedTuple):
    """Cosines and sines of every token's angles, each (B or 1, L, 1, H / 2) in fp32, and how pairs are laid out."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __call__(self, x_BLNH: Tensor) -> Tensor:
        """Turn each pair of the last dimension by its token's angle; computed in fp32, returned in x's dtype."""
        if forms := cpu_forms(x_BLNH):
            return forms.rotate(x_BLNH, self.cos, self.sin, self.interleaved)
        x = x_BLNH.float()
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x.chunk(2, -1)
        turned = a * self.cos - b * self.sin, b * self.cos + a * self.sin
        return (torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)).to(x_BLNH.dtype)


class RoPE(Module, Configurable):
    """Angles of rotary position embedding: position times inverse frequency, per token."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        theta: float = 10_000.0
        """Base of the frequencies: pair i of a head of width H turns by theta^(-2i/H) per position."""
        layout: Literal["half", "interleaved"] = "half"
        """Which two numbers make a pair: i and i + H/2 ("half"), or 2i and 2i + 1 ("interleaved")."""
        scaling: Literal["none", "llama", "yarn"] = "none"
        """How frequencies are stretched for contexts longer than the original training length."""
        scaling_factor: float = 8.0
        """Stretch of the slow frequencies (llama and yarn)."""
        original_seq_len: int = 8192
        """Length of the original training context (llama and yarn)."""
        low_freq_factor: float = 1.0
        """llama: wavelengths above original_seq_len / low_freq_factor are stretched in full."""
        high_freq_factor: float = 4.0
        """llama: wavelengths below original_seq_len / high_freq_factor are left alone."""
        beta_fast: float = 32.0
        """yarn: pairs that turn more often than this over the original length are left alone."""
        beta_slow: float = 1.0
        """yarn: pairs that turn less often than this over the original length are stretched in full."""
        yarn_round: bool = True
        """yarn: round the borders of the ramp to whole pairs."""
        mscale: float = 1.0
        """yarn: weight of the attention temperature 0.1 mscale ln(factor) + 1 applied to cosines and sines."""
        mscale_all_dim: float = 0.0
        """yarn: part of that temperature which attention itself applies to the softmax, divided out here."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if not self.theta > 1:
                yield "theta", f"theta {self.theta} must be above 1"
            if self.scaling != "none" and not self.scaling_factor >= 1:
                yield "scaling_factor", f"scaling_factor {self.scaling_factor} must be at least 1"
            if self.scaling != "none" and self.original_seq_len < 1:
                yield "original_seq_len", f"original_seq_len {self.original_seq_len} must be at least 1"
            if self.scaling == "llama" and not self.high_freq_factor > self.low_freq_factor:
                yield (
                    "high_freq_factor",
                    f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}",
                )
            if self.scaling == "yarn" and not self.beta_fast >= self.beta_slow > 0:
                yield (
                    "beta_fast",
                    f"beta_fast {self.beta_fast} must be at least beta_slow {self.beta_slow}, both above 0",
                )

    inverse_frequency: Tensor

    def __init__(self, config: Config, *, head_dim: int) -> None:
        super().__init__()
        self.interleaved = config.layout == "interleaved"
        self.amplitude = amplitude(config)
        factor = config.scaling_factor if config.scaling == "yarn" else 1.0
        self.temperature = temperature(factor, config.mscale_all_dim)
        """The part of YaRN's temperature that an attention which knows of it applies to its logits, squared."""
        frequencies = torch.tensor(inverse_frequencies(config, head_dim), dtype=torch.float32, device="cpu")
        self.register_buffer("inverse_frequency", frequencies, persistent=False)

    def forward(self, position_BL: Tensor) -> Rotation:
        angle_BLH = position_BL.to(torch.float32)[..., None] * self.inverse_frequency
        cos, sin = angle_BLH.cos() * self.amplitude, angle_BLH.sin() * self.amplitude
        tables = cos.unsqueeze(2), sin.unsqueeze(2), self.interleaved
        if forms := inference_forms(cos):
            return forms.Turn.of(*tables)
        return Rotation(*tables)


def inverse_frequencies(config: RoPE.Config, head_dim: int) -> list[float]:
    """Radians per position of the H / 2 pairs of a head, in double precision: a function of the configuration alone."""
    plain = [config.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if config.scaling == "llama":
        return [_llama(frequency, config) for frequency in plain]
    if config.scaling == "yarn":
        return _yarn(plain, config, head_dim)
    return plain


def temperature(factor: float, mscale: float) -> float:
    """YaRN's growth of attention logits with the stretch: 0.1 mscale ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def amplitude(config: RoPE.Config) -> float:
    """What cosines and sines are multiplied with: YaRN's temperature, less the part that attention applies itself."""
    if config.scaling != "yarn":
        return 1.0
    factor = config.scaling_factor
    return temperature(factor, config.mscale) / temperature(factor, config.mscale_all_dim)


def _llama(frequency: float, config: RoPE.Config) -> float:
    """Llama 3.1's rule (arXiv:2407.21783): stretch long waves, keep short ones, blend between the two borders."""
    turns = config.original_seq_len * frequency / (2 * math.pi)
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = min(max(smooth, 0.0), 1.0)
    return frequency * (keep + (1 - keep) / config.scaling_factor)


def _yarn(plain: list[float], config: RoPE.Config, head_dim: int) -> list[float]:
    """YaRN's rule (arXiv:2309.00071, section 3.2): a linear ramp between the pairs of beta_fast and beta_slow turns."""

    def pair_of(turns: float) -> float:
        return head_dim * math.log(config.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.yarn_round:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    return [f * (1 - s + s / config.scaling_factor) for f, s in zip(plain, stretched, strict=True)]
