"""GPT-OSS (arXiv:2508.10925): a mixture of experts in every block, attention with learned sinks, and in every second
block a window; half-split RoPE stretched by YaRN."""

from dataclasses import dataclass, replace

from core.checkpoint.hf_config import check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.config.errors import UserError
from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE, rope_from_hf, rope_to_hf
from gpt_oss.hf import KEYS


class GptOss(Decoder):
    """The GPT-OSS decoder."""

    HF_KEYS = KEYS

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

    @classmethod
    def from_hf_config(cls, hf: dict) -> Config:
        hf = checked_hf_config(hf, FIXED)
        stated, n_layers = hf["layer_types"], hf["num_hidden_layers"]
        if len(stated) != n_layers or stated != layer_types(n_layers):
            raise UserError(
                "layer_types of this config.json must be sliding_attention and full_attention in turn, one for each of "
                f"{n_layers} layers, it states {stated}"
            )
        return cls.Config(
            **decoder_from_hf(hf),
            rope=rope_from_hf(hf, layout="half"),
            attention=attention(
                n_heads=hf["num_attention_heads"],
                n_kv_heads=hf["num_key_value_heads"],
                head_dim=hf["head_dim"],
                window=hf["sliding_window"],
            ),
            moe=moe(
                n_experts=hf["num_local_experts"],
                top_k=hf["num_experts_per_tok"],
                hidden_dim=hf["intermediate_size"],
                balance_loss_coeff=hf.get("router_aux_loss_coef") or 0.0,
            ),
        )

    def to_hf_config(self) -> dict:
        c = self.config
        check_expressible(c, EXPRESSIBLE, FIXED["model_type"])
        if c.attention.window is None:
            raise UserError("attention.window is None, a gpt_oss of Hugging Face has one in every second block")
        return {
            **FIXED,
            "architectures": ["GptOssForCausalLM"],
            **decoder_to_hf(c),
            **rope_to_hf(c.rope),
            "num_attention_heads": c.attention.n_heads,
            "num_key_value_heads": c.attention.n_kv_heads,
            "head_dim": c.attention.head_dim,
            "sliding_window": c.attention.window,
            "layer_types": layer_types(c.n_layers),
            "num_local_experts": c.moe.router.n_experts,
            "num_experts_per_tok": c.moe.router.top_k,
            "intermediate_size": c.moe.experts.hidden_dim,
            "router_aux_loss_coef": c.moe.router.balance_loss_coeff,
        }


def layer_types(n_layers: int) -> list[str]:
    """Hugging Face's names for the attention of the blocks."""
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]


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


FIXED = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
}
"""What every GPT-OSS states in its Hugging Face `config.json`."""

EXPRESSIBLE = {
    "n_mtp_layers": 0,
    "rope.layout": "half",
    "attention.qk_norm": False,
    "attention.bias": True,
    "attention.sinks": True,
    "moe.router.score": "softmax",
    "moe.router.normalise": True,
    "moe.router.route_scale": 1.0,
    "moe.router.bias": True,
    "moe.router.n_groups": 1,
    "moe.router.load_balance_coeff": None,
    "moe.experts.activation": "clamped_swiglu",
    "moe.experts.bias": True,
    "moe.shared_experts": None,
}
"""What a `config.json` says of our settings by the name of the family alone."""

SIZES = {
    # name: dim, layers, heads, key/value heads, head width, window, experts, experts per token, their width, vocabulary
    "debug": (128, 4, 4, 2, 32, 64, 8, 4, 96, 2_048),
    "20b": (2880, 24, 64, 8, 64, 128, 32, 4, 2_880, 201_088),
    "120b": (2880, 36, 64, 8, 64, 128, 128, 4, 2_880, 201_088),
}


def size(name: str) -> GptOss.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    dim, n_layers, n_heads, n_kv_heads, head_dim, window, n_experts, top_k, hidden_dim, vocab_size = SIZES[name]
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
