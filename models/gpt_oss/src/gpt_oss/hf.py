"""GPT-OSS at Hugging Face: names of weights, in bf16 or in MXFP4 alike, and `config.json`."""

from core.config.errors import UserError
from core.nn.rope_hf import rope_from_hf, rope_to_hf
from core.weights.hf_config import balance_advice, check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.weights.hf_form import HFForm
from core.weights.keys import KeyTable, Stacked, below
from gpt_oss.model import GptOss, attention, moe

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
    "attention.output_bias": True,
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


def from_hf_config(hf: dict) -> GptOss.Config:
    """The GPT-OSS that a `config.json` states."""
    hf = checked_hf_config(hf, FIXED)
    stated, n_layers = hf["layer_types"], hf["num_hidden_layers"]
    if len(stated) != n_layers or stated != layer_types(n_layers):
        raise UserError(
            "layer_types of this config.json must be sliding_attention and full_attention in turn, one for each of "
            f"{n_layers} layers, it states {stated}"
        )
    return GptOss.Config(
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


def to_hf_config(c: GptOss.Config) -> dict:
    """The `config.json` of a GPT-OSS."""
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


FORM = HFForm(keys=KEYS, from_config=from_hf_config, to_config=to_hf_config, advice=balance_advice)
