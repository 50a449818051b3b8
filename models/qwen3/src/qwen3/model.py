"""Qwen3 (arXiv:2505.09388): grouped-query attention with normalised heads, SwiGLU or a mixture of experts, half-split
RoPE."""

from dataclasses import dataclass
from typing import Any

from core.checkpoint.hf_config import HFConfig, check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE, rope_from_hf, rope_to_hf
from qwen3.hf import KEYS, MOE_KEYS


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
        return self.make_block(self.config.attention, feed_forward=self.config.feed_forward)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim

    @classmethod
    def from_hf_config(cls, hf: dict) -> Config:
        hf = checked_hf_config(hf, FIXED)
        return cls.Config(**shared_from_hf(hf), feed_forward=FeedForward.Config(hidden_dim=hf["intermediate_size"]))

    def to_hf_config(self) -> dict:
        c = self.config
        check_expressible(c, EXPRESSIBLE, FIXED["model_type"])
        return {
            **FIXED,
            "architectures": ["Qwen3ForCausalLM"],
            **shared_to_hf(c),
            "intermediate_size": c.feed_forward.hidden_dim,
        }


class Qwen3MoE(Decoder):
    """The Qwen3 decoder with a mixture of experts in every block."""

    HF_KEYS = MOE_KEYS

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

    @classmethod
    def from_hf_config(cls, hf: dict) -> Config:
        hf = checked_hf_config(hf, MOE_FIXED)
        router = Router.Config(
            n_experts=hf.get("num_local_experts") or hf["num_experts"],
            top_k=hf["num_experts_per_tok"],
            normalise=hf["norm_topk_prob"],
            balance_loss_coeff=hf.get("router_aux_loss_coef") or 0.0,
        )
        experts = Experts.Config(hidden_dim=hf["moe_intermediate_size"])
        return cls.Config(**shared_from_hf(hf), moe=MoE.Config(router=router, experts=experts))

    def to_hf_config(self) -> dict:
        c = self.config
        check_expressible(c, MOE_EXPRESSIBLE, MOE_FIXED["model_type"])
        return {
            **MOE_FIXED,
            "architectures": ["Qwen3MoeForCausalLM"],
            **shared_to_hf(c),
            "num_experts": c.moe.router.n_experts,
            "num_experts_per_tok": c.moe.router.top_k,
            "norm_topk_prob": c.moe.router.normalise,
            "router_aux_loss_coef": c.moe.router.balance_loss_coeff,
            "moe_intermediate_size": c.moe.experts.hidden_dim,
        }


def shared_from_hf(hf: HFConfig) -> dict[str, Any]:
    """The fields that both kinds of Qwen3 have, out of a Hugging Face `config.json`."""
    attention = Attention.Config(
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        qk_norm=True,
    )
    return {**decoder_from_hf(hf), "rope": rope_from_hf(hf, layout="half"), "attention": attention}


def shared_to_hf(c: Qwen3.Config | Qwen3MoE.Config) -> dict[str, Any]:
    """What both kinds of Qwen3 state in a Hugging Face `config.json`."""
    return {
        **decoder_to_hf(c),
        **rope_to_hf(c.rope),
        "num_attention_heads": c.attention.n_heads,
        "num_key_value_heads": c.attention.n_kv_heads,
        "head_dim": c.attention.head_dim,
    }


FIXED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}
"""What every dense Qwen3 states in its Hugging Face `config.json`."""

MOE_FIXED = {
    **FIXED,
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""What every other Qwen3 states there: all its blocks have experts."""

EXPRESSIBLE = {
    "n_mtp_layers": 0,
    "rope.layout": "half",
    "attention.qk_norm": True,
    "attention.bias": False,
    "attention.sinks": False,
    "attention.window": None,
}
"""What a `config.json` says of our settings by the name of the family alone."""

MOE_EXPRESSIBLE = {
    **EXPRESSIBLE,
    "moe.router.score": "softmax",
    "moe.router.route_scale": 1.0,
    "moe.router.bias": False,
    "moe.router.n_groups": 1,
    "moe.router.load_balance_coeff": None,
    "moe.experts.activation": "swiglu",
    "moe.experts.bias": False,
    "moe.shared_experts": None,
}
"""The same where the blocks have experts."""

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
