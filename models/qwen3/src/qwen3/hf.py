"""Qwen3 at Hugging Face, dense and with experts: names of weights, and `config.json`.

Qwen2, and what was made of it, is a dense Qwen3 with biases on queries, keys and values, whose heads are not
normalised.
"""

from typing import Any

from core.nn.attention import Attention
from core.nn.feed_forward import FeedForward
from core.nn.moe import Experts, MoE, Router
from core.nn.rope_hf import rope_from_hf, rope_to_hf
from core.weights.hf_config import (
    HFConfig,
    balance_advice,
    check_expressible,
    checked_hf_config,
    decoder_from_hf,
    decoder_to_hf,
)
from core.weights.hf_form import HFForm
from core.weights.keys import KeyTable, Stacked, below
from qwen3.model import Qwen3, Qwen3MoE

ATTENTION: KeyTable = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.wq.bias": "self_attn.q_proj.bias",
    "attention.wk.bias": "self_attn.k_proj.bias",
    "attention.wv.bias": "self_attn.v_proj.bias",
    "attention.wo.bias": "self_attn.o_proj.bias",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
FEED_FORWARD: KeyTable = {
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
SPARSE: KeyTable = {
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.router.selection_bias": None,
    "moe.experts.w1.weight": ("mlp.experts.{e}.gate_proj.weight", Stacked("mlp.experts.gate_up_proj", "first")),
    "moe.experts.w3.weight": ("mlp.experts.{e}.up_proj.weight", Stacked("mlp.experts.gate_up_proj", "second")),
    "moe.experts.w2.weight": ("mlp.experts.{e}.down_proj.weight", Stacked("mlp.experts.down_proj")),
}
ENDS: KeyTable = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
KEYS: KeyTable = {**ENDS, **below("layers.{i}", "model.layers.{i}", {**ATTENTION, **FEED_FORWARD})}
MOE_KEYS: KeyTable = {**ENDS, **below("layers.{i}", "model.layers.{i}", {**ATTENTION, **SPARSE})}

FIXED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}
"""What every dense Qwen3 states in its Hugging Face `config.json`."""

QWEN2 = {**FIXED, "model_type": "qwen2"}
"""What every Qwen2 states there; that it has biases goes without saying."""

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
    "attention.output_bias": True,
    "attention.sinks": False,
    "attention.window": None,
}
"""What a `config.json` says of our settings by the name of the family alone."""

QWEN2_EXPRESSIBLE = {
    **EXPRESSIBLE,
    "attention.qk_norm": False,
    "attention.bias": True,
    "attention.output_bias": False,
}
"""The same of a Qwen2."""

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


def from_hf_config(hf: dict) -> Qwen3.Config:
    """The dense Qwen3, or Qwen2, that a `config.json` states."""
    hf = checked_hf_config(hf, QWEN2 if hf.get("model_type") == QWEN2["model_type"] else FIXED)
    return Qwen3.Config(**shared_from_hf(hf), feed_forward=FeedForward.Config(hidden_dim=hf["intermediate_size"]))


def to_hf_config(config: Qwen3.Config) -> dict:
    """The `config.json` of a dense Qwen3, or of a Qwen2, where heads are not normalised."""
    fixed, settings = (FIXED, EXPRESSIBLE) if config.attention.qk_norm else (QWEN2, QWEN2_EXPRESSIBLE)
    check_expressible(config, settings, str(fixed["model_type"]))
    return {
        **fixed,
        "architectures": ["Qwen3ForCausalLM" if config.attention.qk_norm else "Qwen2ForCausalLM"],
        **shared_to_hf(config),
        "intermediate_size": config.feed_forward.hidden_dim,
    }


def moe_from_hf_config(hf: dict) -> Qwen3MoE.Config:
    """The Qwen3 with experts that a `config.json` states."""
    hf = checked_hf_config(hf, MOE_FIXED)
    router = Router.Config(
        n_experts=hf.get("num_local_experts") or hf["num_experts"],
        top_k=hf["num_experts_per_tok"],
        normalise=hf["norm_topk_prob"],
        balance_loss_coeff=hf.get("router_aux_loss_coef") or 0.0,
    )
    experts = Experts.Config(hidden_dim=hf["moe_intermediate_size"])
    return Qwen3MoE.Config(**shared_from_hf(hf), moe=MoE.Config(router=router, experts=experts))


def moe_to_hf_config(config: Qwen3MoE.Config) -> dict:
    """The `config.json` of a Qwen3 with experts."""
    check_expressible(config, MOE_EXPRESSIBLE, MOE_FIXED["model_type"])
    return {
        **MOE_FIXED,
        "architectures": ["Qwen3MoeForCausalLM"],
        **shared_to_hf(config),
        "num_experts": config.moe.router.n_experts,
        "num_experts_per_tok": config.moe.router.top_k,
        "norm_topk_prob": config.moe.router.normalise,
        "router_aux_loss_coef": config.moe.router.balance_loss_coeff,
        "moe_intermediate_size": config.moe.experts.hidden_dim,
    }


def shared_from_hf(hf: HFConfig) -> dict[str, Any]:
    """The fields that every kind of Qwen has, out of a Hugging Face `config.json`."""
    old, n_heads = hf["model_type"] == QWEN2["model_type"], hf["num_attention_heads"]
    attention = Attention.Config(
        n_heads=n_heads,
        n_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["hidden_size"] // n_heads if old and hf.get("head_dim") is None else hf["head_dim"],
        qk_norm=not old,
        bias=old or bool(hf.get("attention_bias")),
        output_bias=not old,
    )
    return {**decoder_from_hf(hf), "rope": rope_from_hf(hf, layout="half"), "attention": attention}


def shared_to_hf(c: Qwen3.Config | Qwen3MoE.Config) -> dict[str, Any]:
    """What every kind of Qwen states in a Hugging Face `config.json`."""
    return {
        **decoder_to_hf(c),
        **rope_to_hf(c.rope),
        "num_attention_heads": c.attention.n_heads,
        "num_key_value_heads": c.attention.n_kv_heads,
        "head_dim": c.attention.head_dim,
        "attention_bias": c.attention.bias,
    }


FORM = HFForm(keys=KEYS, from_config=from_hf_config, to_config=to_hf_config)
MOE_FORM = HFForm(keys=MOE_KEYS, from_config=moe_from_hf_config, to_config=moe_to_hf_config, advice=balance_advice)
