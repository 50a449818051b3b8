"""What the keys of a Hugging Face `config.json` hold: whoever wrote it, a model gets numbers where it wants numbers."""

import math
from reprlib import repr as short_repr
from typing import Any

from core.config.errors import UserError, at_most
from core.config.fields import type_problems

LARGEST_SIZE = 2**31
"""No size or count is so large."""
FIELD_TYPES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"), int),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), int),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "first_k_dense_replace"), int),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), int),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "num_nextn_predict_layers"), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor"), float),
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_alpha"), float),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "attention_bias"), bool),
    **dict.fromkeys(("model_type", "topk_method"), str),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict[str, float | str | bool | None]),
    "layer_types": list[str],
}
"""What the keys that models read hold, unless null."""


def check_types(hf: dict[str, Any]) -> None:
    """Raise `UserError` where a `config.json` states another type than its key has, or an impossible number."""
    wrong = []
    for key, value in hf.items():
        if value is None or key not in FIELD_TYPES:
            continue
        wrong += [f"{path}: {message}" for path, message in type_problems(value, FIELD_TYPES[key], key)]
        for number in value.values() if isinstance(value, dict) else [value]:
            if type(number) in (int, float) and not (math.isfinite(number) and 0 <= number < LARGEST_SIZE):
                wrong.append(f"{key}: expected a number from 0 to 2^31, got {short_repr(number)}")
    if wrong:
        raise UserError("; ".join(at_most(10, wrong)))
