"""DeepSeek-V3 as other programs keep it."""

from core.weights.keys import KeyPlace
from core.weights.peer_forms import block_places, megatron_form, titan_form
from deepseek_v3.hf import KEYS

WQ = "layers.{i}.attention.wq.weight"
LATENTS: dict[str, tuple[KeyPlace, ...]] = {
    "attention.wq.weight": block_places("self_attention.linear_q_proj.weight"),
    "attention.wq_a.weight": block_places("self_attention.linear_q_down_proj.weight"),
    "attention.q_norm.weight": block_places(
        "self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"
    ),
    "attention.wq_b.weight": block_places("self_attention.linear_q_up_proj.weight"),
    "attention.wkv_a.weight": block_places("self_attention.linear_kv_down_proj.weight"),
    "attention.kv_norm.weight": block_places(
        "self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"
    ),
    "attention.wkv_b.weight": block_places("self_attention.linear_kv_up_proj.weight"),
    "attention_norm.weight": block_places("input_layernorm.weight"),
}
"""The attention of a block in megatron-core, and the norm in front of it, which is no part of a projection."""
FORMS = {"dcp": titan_form(KEYS, {WQ: (WQ,)}), "megatron": megatron_form(others=LATENTS)}
"""torchtitan's joins no projections of this attention."""
