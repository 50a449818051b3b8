"""Qwen3 (arXiv:2505.09388): grouped-query attention with normalised heads, SwiGLU or a mixture of experts, half-split
RoPE."""

from dataclasses import dataclass
from typing import Any

from core.checkpoint.hf_model import HFModel
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE


class Qwen3(Decoder, HFModel):
    """The dense Qwen3 decoder."""

    HF = "qwen3.hf:FORM"

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


SIZES = {
    # name: dim, layers, heads, key/value heads, head width, vocabulary, positions, feed-forward, tied
    "debug": (128, 4, 4, 2, 32, 2_048, 4_096, 384, True),
    "0.6B": (1024, 28, 16, 8, 128, 151_936, 40_960, 3_072, True),
    "1.7B": (2048, 28, 16, 8, 128, 151_936, 40_960, 6_144, True),
    "4B": (2560, 36, 32, 8, 128, 151_936, 40_960, 9_728, True),
    "8B": (4096, 36, 32, 8, 128, 151_936, 40_960, 12_288, False),
    "14B": (5120, 40, 40, 8, 128, 151_936, 40_960, 17_408, False),
    "32B": (5120, 64, 64, 8, 128, 151_936, 40_960, 25_600, False),
}

MOE_SIZES = {
    # name: dim, layers, heads, key/value heads, head width, vocabulary, positions, experts, per token, their width
    "moe_debug": (128, 4, 4, 2, 32, 2_048, 4_096, 16, 4, 48),
    "30B-A3B": (2048, 48, 32, 4, 128, 151_936, 40_960, 128, 8, 768),
    "235B-A22B": (4096, 94, 64, 4, 128, 151_936, 40_960, 128, 8, 1_536),
}


def size(name: str) -> Qwen3.Config | Qwen3MoE.Config:
    """A new configuration of the published size `name`, or of a small one, "debug" or "moe_debug"."""
    if name in MOE_SIZES:
        *shape, n_experts, top_k, hidden_dim = MOE_SIZES[name]
        router = Router.Config(n_experts=n_experts, top_k=top_k, balance_loss_coeff=1e-3)
        return Qwen3MoE.Config(
            **of_shape(*shape), moe=MoE.Config(router=router, experts=Experts.Config(hidden_dim=hidden_dim))
        )
    *shape, hidden_dim, tied = SIZES[name]
    return Qwen3.Config(**of_shape(*shape), tie_embeddings=tied, feed_forward=FeedForward.Config(hidden_dim=hidden_dim))


def of_shape(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, vocab_size: int, max_seq_len: int
) -> dict[str, Any]:
    """The fields that a size of either kind states."""
    return {
        "dim": dim,
        "n_layers": n_layers,
        "vocab_size": vocab_size,
        "max_seq_len": max_seq_len,
        "rope": RoPE.Config(theta=1_000_000.0),
        "attention": Attention.Config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, qk_norm=True),
    }
