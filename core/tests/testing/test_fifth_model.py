"""A fifth model, whole in this file, and no line in core for it: Mixtral (arXiv:2401.04088).

Its blocks mix parts as no other model here does: grouped-query attention with plain heads, one window in all blocks or
none at all, and a mixture of experts whose router is a softmax. What a package keeps in model.py, hf.py and configs.py
stands here together.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.module import Flops
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE
from core.nn.rope_hf import rope_from_hf, rope_to_hf
from core.testing.balance_suite import BalanceSuite
from core.testing.model_suite import ModelSuite
from core.train.debug_run import debug_run
from core.train.trainer import Trainer
from core.weights.hf_config import check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.weights.hf_form import HFForm
from core.weights.hf_model import HFModel
from core.weights.keys import KeyTable, Stacked, below

EXPERT = "block_sparse_moe.experts.{e}"
BLOCK: KeyTable = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "moe.router.gate.weight": "block_sparse_moe.gate.weight",
    "moe.router.selection_bias": None,
    "moe.experts.w1.weight": (f"{EXPERT}.w1.weight", Stacked("mlp.experts.gate_up_proj", "first")),
    "moe.experts.w3.weight": (f"{EXPERT}.w3.weight", Stacked("mlp.experts.gate_up_proj", "second")),
    "moe.experts.w2.weight": (f"{EXPERT}.w2.weight", Stacked("mlp.experts.down_proj")),
}
KEYS: KeyTable = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    **below("layers.{i}", "model.layers.{i}", BLOCK),
}

FIXED = {"model_type": "mixtral", "hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0}
EXPRESSIBLE = {
    "n_mtp_layers": 0,
    "rope.layout": "half",
    "attention.qk_norm": False,
    "attention.bias": False,
    "attention.sinks": False,
    "moe.router.score": "softmax",
    "moe.router.normalise": True,
    "moe.router.route_scale": 1.0,
    "moe.router.bias": False,
    "moe.router.n_groups": 1,
    "moe.router.load_balance_coeff": None,
    "moe.experts.activation": "swiglu",
    "moe.experts.bias": False,
    "moe.shared_experts": None,
}


class Mixtral(Decoder, HFModel):
    """The Mixtral decoder."""

    HF = f"{__name__}:FORM"

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: Attention.Config
        """Self-attention of every block."""
        moe: MoE.Config
        """Mixture of experts of every block."""

    config: Config

    def block(self, i: int) -> Block:
        return self.make_block(self.config.attention, moe=self.config.moe)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim


def from_hf_config(hf: dict) -> Mixtral.Config:
    """The Mixtral that a `config.json` states."""
    hf = checked_hf_config(hf, FIXED)
    return Mixtral.Config(
        **decoder_from_hf(hf),
        rope=rope_from_hf(hf, layout="half"),
        attention=Attention.Config(
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            window=hf.get("sliding_window"),
        ),
        moe=moe(
            hf["num_local_experts"], hf["num_experts_per_tok"], hf["intermediate_size"], hf["router_aux_loss_coef"]
        ),
    )


def to_hf_config(c: Mixtral.Config) -> dict:
    """The `config.json` of a Mixtral."""
    check_expressible(c, EXPRESSIBLE, FIXED["model_type"])
    return {
        **FIXED,
        "architectures": ["MixtralForCausalLM"],
        **decoder_to_hf(c),
        **rope_to_hf(c.rope),
        "num_attention_heads": c.attention.n_heads,
        "num_key_value_heads": c.attention.n_kv_heads,
        "head_dim": c.attention.head_dim,
        "sliding_window": c.attention.window,
        "num_local_experts": c.moe.router.n_experts,
        "num_experts_per_tok": c.moe.router.top_k,
        "intermediate_size": c.moe.experts.hidden_dim,
        "router_aux_loss_coef": c.moe.router.balance_loss_coeff,
    }


FORM = HFForm(keys=KEYS, from_config=from_hf_config, to_config=to_hf_config)


def moe(n_experts: int, top_k: int, hidden_dim: int, balance_loss_coeff: float) -> MoE.Config:
    """The mixture of experts that every Mixtral has, of this shape."""
    router = Router.Config(n_experts=n_experts, top_k=top_k, balance_loss_coeff=balance_loss_coeff)
    return MoE.Config(router=router, experts=Experts.Config(hidden_dim=hidden_dim))


SIZES: dict[str, dict[str, Any]] = {
    "debug": dict(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, window=64, hidden_dim=96, vocab_size=2_048
    ),
    "8x7B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14_336),
}


def size(name: str) -> Mixtral.Config:
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
    window: int | None = None,
    vocab_size: int = 32_000,
) -> Mixtral.Config:
    """A Mixtral of this shape, of 8 experts."""
    return Mixtral.Config(
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=32_768,
        norm_eps=1e-5,
        rope=RoPE.Config(theta=1_000_000.0),
        attention=Attention.Config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, window=window),
        moe=moe(8, 2, hidden_dim, 0.02),
    )


def mixtral_debug() -> Trainer.Config:
    """A small Mixtral that learns the standard library's text on a laptop's CPU in about two minutes."""
    return debug_run(size("debug"))


def tiny(**changes: Any) -> transformers.MixtralConfig:
    """A Mixtral of two blocks, of the width 32, 128 tokens and 6 experts, but for the changes."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    return transformers.MixtralConfig(**{**settings, **changes})


class TestMixtral(ModelSuite, BalanceSuite):
    decoder = Mixtral
    configs = sys.modules[__name__]
    debug = "mixtral_debug"
    golden = Path(__file__).parent / "golden"
    sizes = {name: size(name) for name in SIZES}
    # L (D (2 N H + 2 K H) + D E + 3 E D F + 2 D) + 2 V D + D, in the letters below
    # debug: 4 (128 (256 + 128) + 1024 + 294912 + 256) + 524288 + 128
    parameters = {"debug": 1_905_792, "8x7B": 46_702_792_704}
    # With D the width, L blocks, N query and K key/value heads of width H, E experts of the hidden width F, of which a
    # token takes T, V the vocabulary, and S = 4096 tokens in a row, a token costs forward and backward
    #   matmul    = 6 (L (D (2 N H + 2 K H) + D E + 3 T D F) + V D)    2 forward and 4 backward for each weight in use
    #   attention = 12 L N H S                                         q k^T and p v, 2 S N H each, three times
    # debug: 6 (4 (49152 + 1024 + 73728) + 262144)
    flops = {"debug": Flops(4_546_560, 25_165_824), "8x7B": Flops(76_491_522_048, 6_442_450_944)}
    products = {0: "wq wk* wv wo* gate* w1 w3 w2"}
    spread = tiny(
        vocab_size=62,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        sliding_window=6,
    )
    hf_configs = {
        "plain": tiny(),
        "window": tiny(sliding_window=7, head_dim=6, tie_word_embeddings=True),
    }

    @property
    def hf_model(self) -> Any:
        """Looked up when a test asks: the ranks of a layout import this file too, and this class takes seconds."""
        return transformers.MixtralForCausalLM
