"""Llama 3 at Hugging Face: names of weights, those whose rows stand in another order there, and `config.json`."""

from core.nn.attention import Attention
from core.nn.feed_forward import FeedForward
from core.nn.rope_hf import rope_from_hf, rope_to_hf
from core.weights.hf_config import HFConfig, check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.weights.hf_form import HFForm
from core.weights.keys import KeyTable
from llama3.model import Llama3

KEYS: KeyTable = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attention.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attention.wq.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attention.wk.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attention.wv.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.attention.wo.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.feed_forward.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.feed_forward.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.feed_forward.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

HALVES = frozenset(f"layers.{{i}}.attention.{each}" for each in ("wq.weight", "wk.weight", "wq.bias", "wk.bias"))

FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "mlp_bias": False,
}
"""What every Llama 3 states in its Hugging Face `config.json`."""

DEFAULTS = {"rope_theta": 10_000.0, "max_position_embeddings": 2_048, "tie_word_embeddings": False}
"""What transformers assumes where a `config.json` states nothing, as those of the first Llamas do; the number of
key/value heads is then that of the heads, which share the width of the residual stream."""

EXPRESSIBLE = {
    "n_mtp_layers": 0,
    "rope.layout": "interleaved",
    "attention.qk_norm": False,
    "attention.output_bias": True,
    "attention.sinks": False,
    "attention.window": None,
}
"""What a `config.json` says of our settings by the name of the family alone."""


def from_hf_config(hf: dict) -> Llama3.Config:
    """The Llama 3 that a `config.json` states."""
    hf = HFConfig(DEFAULTS | {key: value for key, value in checked_hf_config(hf, FIXED).items() if value is not None})
    n_heads = hf["num_attention_heads"]
    return Llama3.Config(
        **decoder_from_hf(hf),
        rope=rope_from_hf(hf, layout="interleaved"),
        attention=Attention.Config(
            n_heads=n_heads,
            n_kv_heads=hf.get("num_key_value_heads", n_heads),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // n_heads,
            bias=hf.get("attention_bias", False),
        ),
        feed_forward=FeedForward.Config(hidden_dim=hf["intermediate_size"]),
    )


def to_hf_config(config: Llama3.Config) -> dict:
    """The `config.json` of a Llama 3."""
    check_expressible(config, EXPRESSIBLE, FIXED["model_type"])
    return {
        **FIXED,
        "architectures": ["LlamaForCausalLM"],
        **decoder_to_hf(config),
        **rope_to_hf(config.rope),
        "num_attention_heads": config.attention.n_heads,
        "num_key_value_heads": config.attention.n_kv_heads,
        "head_dim": config.attention.head_dim,
        "attention_bias": config.attention.bias,
        "intermediate_size": config.feed_forward.hidden_dim,
    }


FORM = HFForm(keys=KEYS, halves=HALVES, from_config=from_hf_config, to_config=to_hf_config)
