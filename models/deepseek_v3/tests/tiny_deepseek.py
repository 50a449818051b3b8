"""Tiny configurations of the two families that transformers has, and one class for both of its models."""

import random
from typing import Any

from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedModel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
UNEVEN = {**YARN, "mscale": 0.6, "mscale_all_dim": 1.7}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
SETTINGS = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 128,
    "rope_parameters": MSCALE,
}


class HuggingFace(AutoModelForCausalLM):
    """The model of transformers that a configuration asks for."""

    def __new__(cls, config: Any) -> PreTrainedModel:
        return cls.from_config(config)


def v3(**changes: Any) -> DeepseekV3Config:
    """A DeepSeek-V3 of a dense and a sparse block, of the width 32 and 128 tokens, but for the changes."""
    return DeepseekV3Config(**{**SETTINGS, "num_nextn_predict_layers": 0, **changes})


def v2(**changes: Any) -> DeepseekV2Config:
    """The same as a DeepSeek-V2."""
    return DeepseekV2Config(**{**SETTINGS, "topk_method": "group_limited_greedy", **changes})


def drawn(seed: int) -> DeepseekV3Config | DeepseekV2Config:
    """A tiny model with everything about it drawn at random."""
    draw = random.Random(seed)
    n_heads = draw.choice([1, 2, 5])
    n_layers = draw.choice([2, 3])
    n_groups = draw.choice([1, 2, 3])
    size_of_group = draw.choice([2, 3, 5])
    limit = draw.randint(1, n_groups)
    top_k = draw.randint(2, limit * size_of_group)
    common = {
        "vocab_size": draw.randrange(50, 200),
        "hidden_size": n_heads * draw.choice([12, 20]),
        "intermediate_size": draw.randrange(16, 100),
        "moe_intermediate_size": 4 * draw.randrange(2, 8),  # whole 16 bytes, which the products of transformers need
        "num_hidden_layers": n_layers,
        "first_k_dense_replace": draw.randrange(n_layers),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "q_lora_rank": draw.choice([None, 7, 18]),
        "kv_lora_rank": draw.choice([6, 22]),
        "qk_nope_head_dim": draw.choice([4, 8, 20]),
        "qk_rope_head_dim": draw.choice([2, 6, 16]),
        "v_head_dim": draw.choice([5, 13, 40]),
        "n_routed_experts": n_groups * size_of_group,
        "n_shared_experts": draw.choice([1, 2, 3]),
        "num_experts_per_tok": top_k,
        "n_group": n_groups,
        "topk_group": limit,
        "routed_scaling_factor": draw.choice([0.5, 1.0, 4.0]),
        "rms_norm_eps": 10.0 ** -draw.randrange(3, 7),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": draw.choice([PLAIN, YARN, MSCALE, UNEVEN]),
    }
    if seed % 2:
        return v3(**common, norm_topk_prob=draw.random() < 0.7)
    return v2(**common, topk_method=draw.choice(["greedy", "group_limited_greedy"]))
