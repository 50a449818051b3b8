"""Llama 3 (arXiv:2407.21783): grouped-query attention, SwiGLU, interleaved RoPE stretched for long contexts."""

from dataclasses import dataclass
from typing import Any

from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.rope import RoPE
from core.weights.hf_model import HFModel


class Llama3(Decoder, HFModel):
    """The Llama 3 decoder."""

    HF = "llama3.hf:FORM"
    PEERS = "llama3.peers:FORMS"

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: Attention.Config
        """Self-attention of every block."""
        feed_forward: FeedForward.Config
        """Feed-forward network of every block."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        return self.make_block(self.config.attention, feed_forward=self.config.feed_forward)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim


SIZES: dict[str, dict[str, Any]] = {
    "debug": dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=384, vocab_size=2_048),
    "1B": dict(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8_192, rope_factor=32, tied=True
    ),
    "3B": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, hidden_dim=8_192, rope_factor=32, tied=True),
    "8B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14_336),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28_672),
    "405B": dict(dim=16_384, n_layers=126, n_heads=128, n_kv_heads=8, hidden_dim=53_248),
}
"""The published sizes, and a small one."""


def size(name: str) -> Llama3.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    return of_shape(**SIZES[name])


def of_shape(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_dim: int,
    head_dim: int = 128,
    vocab_size: int = 128_256,
    rope_factor: float = 8.0,
    tied: bool = False,
) -> Llama3.Config:
    """A Llama 3 of this shape, for 131,072 positions."""
    return Llama3.Config(
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=131_072,
        norm_eps=1e-5,
        tie_embeddings=tied,
        rope=RoPE.Config(theta=500_000.0, layout="interleaved", scaling="llama", scaling_factor=float(rope_factor)),
        attention=Attention.Config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim),
        feed_forward=FeedForward.Config(hidden_dim=hidden_dim),
    )
