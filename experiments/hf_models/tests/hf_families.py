"""Families of transformers, tiny."""

from collections.abc import Callable
from typing import Any

import transformers as tf

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, final_logit_softcapping=3.0),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "olmoe": lambda: tf.OlmoeConfig(**SIZES, **EXPERTS),
    "granite": lambda: tf.GraniteConfig(**SIZES, logits_scaling=2.0, residual_multiplier=0.5),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=97, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "lfm2": lambda: tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(**SIZES, head_dim=16, lru_width=64, attention_window_size=8),
}
CHUNKED = {"llama", "qwen3", "gpt_neox", "olmoe", "gpt2", "gpt_oss", "lfm2"}
"""Families that hand on as logits what their head makes."""
APART = set(FAMILIES) - {"gpt_oss", "lfm2", "recurrent_gemma"}
"""Families that keep the documents of a row apart: GPT-OSS makes its masks without positions, convolutions and
recurrences run on from one document into the next."""
WRITING = set(FAMILIES) - {"recurrent_gemma"}
"""Families that hand on what they keep of a text."""
