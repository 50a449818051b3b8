"""Qwen3 (arXiv:2505.09388): grouped-query attention with normalised heads, SwiGLU or a mixture of experts, half-split
RoPE."""

from dataclasses import dataclass
from typing import Any

from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE
from core.weights.hf_model import HFModel


class Qwen3(Decoder, HFModel):
    """The dense Qwen3 decoder."""

    HF = "qwen3.hf:FORM"
    PEERS = "qwen3.peers:FORMS"

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


class Qwen3MoE(Decoder, HFModel):
    """The Qwen3 decoder with a mixture of experts in every block."""

    HF = "qwen3.hf:MOE_FORM"
    PEERS = "qwen3.peers:MOE_FORMS"

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: Attention.Config
        """Self-attention of every block."""
        moe: MoE.Config
        """Mixture of experts of every block."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        return self.make_block(self.config.attention, moe=self.config.moe)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim


DEBUG = dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=2_048, max_seq_len=4_096)
SIZES: dict[str, dict[str, Any]] = {
    "debug": dict(DEBUG, hidden_dim=384, tied=True),
    "0.6B": dict(dim=1024, n_layers=28, n_heads=16, n_kv_heads=8, hidden_dim=3_072, tied=True),
    "1.7B": dict(dim=2048, n_layers=28, n_heads=16, n_kv_heads=8, hidden_dim=6_144, tied=True),
    "4B": dict(dim=2560, n_layers=36, n_heads=32, n_kv_heads=8, hidden_dim=9_728, tied=True),
    "8B": dict(dim=4096, n_layers=36, n_heads=32, n_kv_heads=8, hidden_dim=12_288, tied=False),
    "14B": dict(dim=5120, n_layers=40, n_heads=40, n_kv_heads=8, hidden_dim=17_408, tied=False),
    "32B": dict(dim=5120, n_layers=64, n_heads=64, n_kv_heads=8, hidden_dim=25_600, tied=False),
}
MOE_SIZES: dict[str, dict[str, Any]] = {
    "moe_debug": dict(DEBUG, n_experts=16, top_k=4, hidden_dim=48),
    "30B-A3B": dict(dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, n_experts=128, top_k=8, hidden_dim=768),
    "235B-A22B": dict(dim=4096, n_layers=94, n_heads=64, n_kv_heads=4, n_experts=128, top_k=8, hidden_dim=1_536),
}
"""The published sizes, and small ones; `hidden_dim` of those with experts is that of one expert."""


def size(name: str) -> Qwen3.Config | Qwen3MoE.Config:
    """A new configuration of the published size `name`, or of a small one, "debug" or "moe_debug"."""
    return sparse(**MOE_SIZES[name]) if name in MOE_SIZES else dense(**SIZES[name])


def dense(*, hidden_dim: int, tied: bool, **shape: int) -> Qwen3.Config:
    """A dense Qwen3 of this shape."""
    return Qwen3.Config(**shared(**shape), tie_embeddings=tied, feed_forward=FeedForward.Config(hidden_dim=hidden_dim))


def sparse(*, n_experts: int, top_k: int, hidden_dim: int, **shape: int) -> Qwen3MoE.Config:
    """A Qwen3 of this shape with experts."""
    router = Router.Config(n_experts=n_experts, top_k=top_k, balance_loss_coeff=1e-3)
    experts = Experts.Config(hidden_dim=hidden_dim)
    return Qwen3MoE.Config(**shared(**shape), moe=MoE.Config(router=router, experts=experts))


def shared(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int = 128,
    vocab_size: int = 151_936,
    max_seq_len: int = 40_960,
) -> dict[str, Any]:
    """The fields that both kinds have."""
    return {
        "dim": dim,
        "n_layers": n_layers,
        "vocab_size": vocab_size,
        "max_seq_len": max_seq_len,
        "rope": RoPE.Config(theta=1_000_000.0),
        "attention": Attention.Config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, qk_norm=True),
    }
