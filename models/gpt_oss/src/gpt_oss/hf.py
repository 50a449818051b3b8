"""GPT-OSS's names in Hugging Face checkpoints, in bf16 or in MXFP4 alike."""

from core.checkpoint.keys import KeyTable, Stacked, below

BLOCK: KeyTable = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq.bias": "self_attn.q_proj.bias",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wk.bias": "self_attn.k_proj.bias",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wv.bias": "self_attn.v_proj.bias",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.wo.bias": "self_attn.o_proj.bias",
    "attention.sinks": "self_attn.sinks",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "moe.router.gate.weight": "mlp.router.weight",
    "moe.router.gate.bias": "mlp.router.bias",
    "moe.router.selection_bias": None,
    "moe.experts.w1.weight": Stacked("mlp.experts.gate_up_proj", "even", transposed=True),
    "moe.experts.w1.bias": Stacked("mlp.experts.gate_up_proj_bias", "even"),
    "moe.experts.w3.weight": Stacked("mlp.experts.gate_up_proj", "odd", transposed=True),
    "moe.experts.w3.bias": Stacked("mlp.experts.gate_up_proj_bias", "odd"),
    "moe.experts.w2.weight": Stacked("mlp.experts.down_proj", transposed=True),
    "moe.experts.w2.bias": Stacked("mlp.experts.down_proj_bias"),
}
KEYS: KeyTable = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    **below("layers.{i}", "model.layers.{i}", BLOCK),
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
