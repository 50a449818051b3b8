"""Llama 3 (arXiv:2407.21783): grouped-query attention, SwiGLU, interleaved RoPE stretched for long contexts."""

from dataclasses import dataclass

from core.checkpoint.hf_model import HFModel
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.rope import RoPE


class Llama3(Decoder, HFModel):
    """The Llama 3 decoder."""

    HF = "llama3.hf:FORM"

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


SIZES = {
    # name: dim, layers, heads, key/value heads, head width, feed-forward, vocabulary, positions, rope factor, tied
    "debug": (128, 4, 4, 2, 32, 384, 2_048, 131_072, 8.0, False),
    "1B": (2048, 16, 32, 8, 64, 8_192, 128_256, 131_072, 32.0, True),
    "3B": (3072, 28, 24, 8, 128, 8_192, 128_256, 131_072, 32.0, True),
    "8B": (4096, 32, 32, 8, 128, 14_336, 128_256, 131_072, 8.0, False),
    "70B": (8192, 80, 64, 8, 128, 28_672, 128_256, 131_072, 8.0, False),
    "405B": (16384, 126, 128, 8, 128, 53_248, 128_256, 131_072, 8.0, False),
}


def size(name: str) -> Llama3.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, max_seq_len, factor, tied = SIZES[name]
    return Llama3.Config(
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        norm_eps=1e-5,
        tie_embeddings=tied,
        rope=RoPE.Config(theta=500_000.0, layout="interleaved", scaling="llama", scaling_factor=factor),
        attention=Attention.Config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim),
        feed_forward=FeedForward.Config(hidden_dim=hidden_dim),
    )
