"""DeepSeek at Hugging Face: names of weights, and what `config.json` states.

There are two families there. `deepseek_v2` has softmax routers without a bias on the choice; `deepseek_v3` has sigmoid
routers with one, and blocks for multi-token prediction. Kimi K2 is of the second under another name.
"""

from typing import Any

from core.config.errors import UserError
from core.nn.feed_forward import FeedForward
from core.nn.mla import MLA
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE
from core.nn.rope_hf import rope_from_hf, rope_to_hf
from core.weights.hf_config import HFConfig, check_expressible, checked_hf_config, decoder_from_hf, decoder_to_hf
from core.weights.hf_form import HFForm
from core.weights.keys import KeyTable, Stacked, below
from deepseek_v3.model import ROUTERS, DeepSeekV3

BLOCK: KeyTable = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.router.selection_bias": "mlp.gate.e_score_correction_bias",
    "moe.experts.w1.weight": ("mlp.experts.{e}.gate_proj.weight", Stacked("mlp.experts.gate_up_proj", "first")),
    "moe.experts.w3.weight": ("mlp.experts.{e}.up_proj.weight", Stacked("mlp.experts.gate_up_proj", "second")),
    "moe.experts.w2.weight": ("mlp.experts.{e}.down_proj.weight", Stacked("mlp.experts.down_proj")),
    "moe.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "moe.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "moe.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
}
AHEAD: KeyTable = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
KEYS: KeyTable = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    **below("layers.{i}", "model.layers.{i}", BLOCK),
    **below("ahead.{i}", "model.layers.{i}", AHEAD),
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IGNORED = ("*rotary_emb.inv_freq", "model.layers.{n_layers+i}.*")
"""Blocks for multi-token prediction that a model does not have."""
COPIES = {
    "model.layers.{n_layers+i}.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{n_layers+i}.shared_head.head.weight": "output.weight",
}
"""What stands in each of those that it has, beside its own weights."""

FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "seq_aux": True,
}
V2 = FIXED | {"model_type": "deepseek_v2", "mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False}
V3 = FIXED | {
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
}
"""What every DeepSeek-V2 and every DeepSeek-V3 states in its `config.json`."""

KIMI = "kimi_k2"
"""Kimi K2's `model_type`: its architecture is DeepSeek-V3's, and so it is written."""

SETTINGS = {
    "moe.router.bias": False,
    "moe.experts.bias": False,
    "moe.experts.activation": "swiglu",
    "rope.layout": "interleaved",
}
V2_SETTINGS = SETTINGS | {"moe.router.normalise": False, "n_mtp_layers": 0}
"""What the `config.json` of any of them, and of DeepSeek-V2, cannot state otherwise."""

HEAD_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Settings of the attention that have the same name there."""


def attention_from_hf(hf: HFConfig) -> MLA.Config:
    """The attention of every block. Raises `UserError` for key/value heads that queries share."""
    n_heads = hf["num_attention_heads"]
    if hf.get("num_key_value_heads") not in (None, n_heads):
        raise UserError(f"num_key_value_heads {hf['num_key_value_heads']} is not num_attention_heads {n_heads}")
    if "q_lora_rank" not in hf:  # where it is null, queries are drawn from the residual stream
        raise UserError("this config.json does not state q_lora_rank")
    return MLA.Config(n_heads=n_heads, q_lora_rank=hf.get("q_lora_rank"), **{name: hf[name] for name in HEAD_DIMS})


def attention_to_hf(attention: MLA.Config) -> dict[str, Any]:
    """What `config.json` states about the attention of every block."""
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank,
        **{name: getattr(attention, name) for name in HEAD_DIMS},
    }


def moe_from_hf(hf: HFConfig) -> MoE.Config:
    """The mixture of experts of every block that has one. Raises `UserError` for an unknown way of choosing."""
    soft, hidden_dim = hf["model_type"] == V2["model_type"], hf["moe_intermediate_size"]
    if soft and hf["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise UserError(f"topk_method {hf['topk_method']!r} is not supported: only greedy and group_limited_greedy are")
    grouped = not soft or hf["topk_method"] == "group_limited_greedy"
    kind = ROUTERS[hf["model_type"]] | {"normalise": hf["norm_topk_prob"]}
    router = Router.Config(
        n_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        route_scale=float(hf["routed_scaling_factor"]),
        n_groups=hf["n_group"] if grouped else 1,
        n_limited_groups=hf["topk_group"] if grouped else 1,
        balance_loss_coeff=float(hf.get("aux_loss_alpha") or 0.0),
        **kind,
    )
    return MoE.Config(
        router=router,
        experts=Experts.Config(hidden_dim=hidden_dim),
        shared_experts=FeedForward.Config(hidden_dim=hf["n_shared_experts"] * hidden_dim),
    )


def moe_to_hf(moe: MoE.Config) -> dict[str, Any]:
    """What `config.json` states about the mixture of experts."""
    router, shared = moe.router, moe.shared_experts
    assert shared is not None, "`check_exportable` comes first"
    soft = {"topk_method": "greedy" if router.n_groups == 1 else "group_limited_greedy"}
    return {
        **(V2 | soft if router.score == "softmax" else V3),
        "n_routed_experts": router.n_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.normalise,
        "routed_scaling_factor": router.route_scale,
        "n_group": router.n_groups,
        "topk_group": router.n_limited_groups,
        "aux_loss_alpha": router.balance_loss_coeff,
        "moe_intermediate_size": moe.experts.hidden_dim,
        "n_shared_experts": shared.hidden_dim // moe.experts.hidden_dim,
    }


def rotation_from_hf(hf: HFConfig) -> RoPE.Config:
    """The rotary embedding. Raises `UserError` for a YaRN temperature of which only one half is stated: DeepSeek's own
    code and transformers read that differently.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        raise UserError("this config.json states one of mscale and mscale_all_dim: state both, or neither")
    return rope_from_hf(hf, layout="interleaved")


def check_exportable(config: Any) -> None:
    """Raise `UserError` for what no family there computes, or only the other one; `config` is that of the decoder."""
    moe: MoE.Config = config.moe
    soft = moe.router.score == "softmax"
    family, fixed = ("deepseek_v2", V2_SETTINGS) if soft else ("deepseek_v3", SETTINGS)
    if moe.router.n_groups > 1:
        fixed = fixed | {"moe.router.group_score": ROUTERS[family]["group_score"]}
    check_expressible(config, fixed, family)
    if soft and moe.router.load_balance_coeff is not None:
        raise UserError("a deepseek_v2 of Hugging Face has no selection bias: this model's would be lost")
    if not soft and moe.router.load_balance_coeff is None:
        raise UserError("a deepseek_v3 of Hugging Face has a selection bias, this model none: set load_balance_coeff")
    width, shared = moe.experts.hidden_dim, moe.shared_experts
    if shared is None or shared.hidden_dim % width:
        found = shared and shared.hidden_dim
        raise UserError(f"moe.shared_experts.hidden_dim {found} is no multiple of moe.experts.hidden_dim {width}")


def from_hf_config(hf: dict) -> DeepSeekV3.Config:
    """The DeepSeek that a `config.json` states."""
    if hf.get("model_type") == KIMI:
        hf = hf | {"model_type": V3["model_type"]}
    hf = checked_hf_config(hf, V2 if hf.get("model_type") == V2["model_type"] else V3)
    return DeepSeekV3.Config(
        **decoder_from_hf(hf),
        n_mtp_layers=hf.get("num_nextn_predict_layers") or 0,
        rope=rotation_from_hf(hf),
        attention=attention_from_hf(hf),
        feed_forward=FeedForward.Config(hidden_dim=hf["intermediate_size"]),
        n_dense_layers=hf["first_k_dense_replace"],
        moe=moe_from_hf(hf),
    )


def to_hf_config(c: DeepSeekV3.Config) -> dict:
    """The `config.json` of a DeepSeek."""
    check_exportable(c)
    soft = c.moe.router.score == "softmax"
    mtp = {} if soft else {"num_nextn_predict_layers": c.n_mtp_layers}
    return {
        "architectures": [f"DeepseekV{2 if soft else 3}ForCausalLM"],
        **decoder_to_hf(c),
        **rope_to_hf(c.rope),
        **attention_to_hf(c.attention),
        "intermediate_size": c.feed_forward.hidden_dim,
        "first_k_dense_replace": c.n_dense_layers,
        **moe_to_hf(c.moe),
        **mtp,
    }


FORM = HFForm(
    keys=KEYS,
    ignored=IGNORED,
    mtp_key="model.layers.{i}.eh_proj.weight",
    copies=COPIES,
    from_config=from_hf_config,
    to_config=to_hf_config,
)
