"""GPT-OSS (arXiv:2508.10925): a mixture of experts in every block, attention with learned sinks, and in every second
block a window; half-split RoPE stretched by YaRN."""

from dataclasses import dataclass, replace

from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE
from core.weights.hf_model import HFModel


class GptOss(Decoder, HFModel):
    """The GPT-OSS decoder."""

    HF = "gpt_oss.hf:FORM"
    PEERS = "gpt_oss.peers:FORMS"

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: Attention.Config
        """Self-attention of every block; its window is that of blocks 0, 2, 4, ..., the others see all before them."""
        moe: MoE.Config
        """Mixture of experts of every block."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        c = self.config
        return self.make_block(replace(c.attention, window=None) if i % 2 else c.attention, moe=c.moe)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim


def attention(*, n_heads: int, n_kv_heads: int, head_dim: int, window: int) -> Attention.Config:
    """The attention that every GPT-OSS has, of this shape."""
    return Attention.Config(
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, bias=True, sinks=True, window=window
    )


def moe(*, n_experts: int, top_k: int, hidden_dim: int, balance_loss_coeff: float) -> MoE.Config:
    """The mixture of experts that every GPT-OSS has, of this shape."""
    return MoE.Config(
        router=Router.Config(n_experts=n_experts, top_k=top_k, bias=True, balance_loss_coeff=balance_loss_coeff),
        experts=Experts.Config(hidden_dim=hidden_dim, activation="clamped_swiglu", bias=True),
    )


DEBUG = dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, window=64, vocab_size=2_048)
SIZES: dict[str, dict[str, int]] = {
    "debug": dict(DEBUG, n_experts=8, top_k=4, hidden_dim=96),
    "20b": dict(dim=2880, n_layers=24, n_heads=64, n_kv_heads=8, n_experts=32, top_k=4, hidden_dim=2_880),
    "120b": dict(dim=2880, n_layers=36, n_heads=64, n_kv_heads=8, n_experts=128, top_k=4, hidden_dim=2_880),
}
"""The published sizes, and a small one; `hidden_dim` is that of one expert."""


def size(name: str) -> GptOss.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    return of_shape(**SIZES[name])


def of_shape(
    *,
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    n_experts: int,
    top_k: int,
    hidden_dim: int,
    head_dim: int = 64,
    window: int = 128,
    vocab_size: int = 201_088,
) -> GptOss.Config:
    """A GPT-OSS of this shape."""
    return GptOss.Config(
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=131_072,
        norm_eps=1e-5,
        rope=RoPE.Config(theta=150_000.0, scaling="yarn", scaling_factor=32.0, original_seq_len=4096, yarn_round=False),
        attention=attention(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, window=window),
        moe=moe(n_experts=n_experts, top_k=top_k, hidden_dim=hidden_dim, balance_loss_coeff=1e-3),
    )
