"""Qwen3 (arXiv:2505.09388): grouped-query attention with normalised heads, SwiGLU, half-split RoPE."""

from dataclasses import dataclass

from core.checkpoint.hf import checked_hf_config, decoder_from_hf, decoder_to_hf
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.rope import RoPE, rope_from_hf, rope_to_hf
from qwen3.convert import KEYS


class Qwen3(Decoder):
    """The dense Qwen3 decoder."""

    HF_KEYS = KEYS

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: Attention.Config
        """Self-attention of every block."""
        feed_forward: FeedForward.Config
        """Feed-forward network of every block."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        return self.make_block(self.config.attention, self.config.feed_forward)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim

    @classmethod
    def from_hf_config(cls, hf: dict) -> Config:
        hf = checked_hf_config(hf, FIXED)
        return cls.Config(
            **decoder_from_hf(hf),
            rope=rope_from_hf(hf, layout="half"),
            attention=Attention.Config(
                n_heads=hf["num_attention_heads"],
                n_kv_heads=hf["num_key_value_heads"],
                head_dim=hf["head_dim"],
                qk_norm=True,
            ),
            feed_forward=FeedForward.Config(hidden_dim=hf["intermediate_size"]),
        )

    def to_hf_config(self) -> dict:
        c = self.config
        return {
            **FIXED,
            "architectures": ["Qwen3ForCausalLM"],
            **decoder_to_hf(c),
            **rope_to_hf(c.rope),
            "num_attention_heads": c.attention.n_heads,
            "num_key_value_heads": c.attention.n_kv_heads,
            "head_dim": c.attention.head_dim,
            "intermediate_size": c.feed_forward.hidden_dim,
        }


FIXED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}
"""What every dense Qwen3 states in its Hugging Face `config.json`."""

SIZES = {
    # name: dim, layers, heads, key/value heads, head width, feed-forward, vocabulary, positions, tied
    "debug": (128, 4, 4, 2, 32, 384, 2_048, 4_096, True),
    "0.6B": (1024, 28, 16, 8, 128, 3_072, 151_936, 40_960, True),
    "1.7B": (2048, 28, 16, 8, 128, 6_144, 151_936, 40_960, True),
    "4B": (2560, 36, 32, 8, 128, 9_728, 151_936, 40_960, True),
    "8B": (4096, 36, 32, 8, 128, 12_288, 151_936, 40_960, False),
    "14B": (5120, 40, 40, 8, 128, 17_408, 151_936, 40_960, False),
    "32B": (5120, 64, 64, 8, 128, 25_600, 151_936, 40_960, False),
}


def size(name: str) -> Qwen3.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, max_seq_len, tied = SIZES[name]
    return Qwen3.Config(
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        tie_embeddings=tied,
        rope=RoPE.Config(theta=1_000_000.0),
        attention=Attention.Config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, qk_norm=True),
        feed_forward=FeedForward.Config(hidden_dim=hidden_dim),
    )
