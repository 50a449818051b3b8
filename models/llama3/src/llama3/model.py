"""Llama 3 (arXiv:2407.21783): grouped-query attention, SwiGLU, interleaved RoPE stretched for long contexts."""

from dataclasses import dataclass

from core.checkpoint.hf_config import check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.rope import RoPE, rope_from_hf, rope_to_hf
from llama3.hf import HALVES, KEYS


class Llama3(Decoder):
    """The Llama 3 decoder."""

    HF_KEYS = KEYS
    HF_HALVES = HALVES

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

    @classmethod
    def from_hf_config(cls, hf: dict) -> Config:
        hf = checked_hf_config(hf, FIXED)
        n_heads = hf["num_attention_heads"]
        return cls.Config(
            **decoder_from_hf(hf),
            rope=rope_from_hf(hf, layout="interleaved"),
            attention=Attention.Config(
                n_heads=n_heads,
                n_kv_heads=hf["num_key_value_heads"],
                head_dim=hf.get("head_dim") or hf["hidden_size"] // n_heads,
            ),
            feed_forward=FeedForward.Config(hidden_dim=hf["intermediate_size"]),
        )

    def to_hf_config(self) -> dict:
        c = self.config
        check_expressible(c, EXPRESSIBLE, FIXED["model_type"])
        return {
            **FIXED,
            "architectures": ["LlamaForCausalLM"],
            **decoder_to_hf(c),
            **rope_to_hf(c.rope),
            "num_attention_heads": c.attention.n_heads,
            "num_key_value_heads": c.attention.n_kv_heads,
            "head_dim": c.attention.head_dim,
            "intermediate_size": c.feed_forward.hidden_dim,
        }


FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}
"""What every Llama 3 states in its Hugging Face `config.json`."""

EXPRESSIBLE = {
    "n_mtp_layers": 0,
    "rope.layout": "interleaved",
    "attention.qk_norm": False,
    "attention.bias": False,
    "attention.sinks": False,
    "attention.window": None,
}
"""What a `config.json` says of our settings by the name of the family alone."""

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
