"""Qwen3's names in Hugging Face checkpoints."""

from core.checkpoint.keys import KeyTable, Stacked, below

ATTENTION: KeyTable = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
FEED_FORWARD: KeyTable = {
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
MOE: KeyTable = {
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
MOE_KEYS: KeyTable = {**ENDS, **below("layers.{i}", "model.layers.{i}", {**ATTENTION, **MOE})}
