#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0.
#
# Behaviour: in a DeepSeek-V3, whose first layers are dense and whose others have experts, LoRA on exactly
# `model.layers.0.mlp.gate_proj`, `up_proj` and `down_proj` puts no adapter on that layer. It puts adapters on the fused
# experts of all other layers. peft translates the names that experts had before transformers 5 to the fused parameters
# by the last word of a target, wherever the target lies.
# The good guess: a full module name adapts that module, as it does for `model.layers.0.self_attn.o_proj`.
# Who meets it: whoever adapts the dense or the shared network of such a model: other weights are trained than were named,
# and a folder of adapters for the named ones has no place for them when it is loaded.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0
"$folder/env/bin/pip" install -q transformers==5.24.0 peft==0.21.2
"$folder/env/bin/python" -W ignore - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

config = DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=16, max_position_embeddings=64,
)


def adapted(targets):
    adapters = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    names = [name for name, _ in get_peft_model(DeepseekV3ForCausalLM(config), adapters).named_parameters()]
    return sorted({name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in names if "lora_A" in name})


attention = ["model.layers.0.self_attn.o_proj"]
dense = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
for targets in (attention, dense):
    print("asked for", targets, "-> adapted", adapted(targets))
assert adapted(attention) == attention
assert adapted(dense) and all(name.startswith("model.layers.1.mlp.experts") for name in adapted(dense))
PYTHON
