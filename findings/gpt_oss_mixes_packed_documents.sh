#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0.
#
# Behaviour: where documents lie one behind the other in a row and `position_ids` start again at each, Qwen3 keeps them
# apart without an attention mask: the second one gets the logits that it has alone. GPT-OSS, called in the same way, lets
# it look at the first: its masks are made without `position_ids`. Nothing is said.
# The good guess: what positions that start again mean is a matter of the library, not of the family.
# Who meets it: whoever trains on packed rows without padding (as DataCollatorWithFlattening makes them) and changes the
# model to GPT-OSS.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0
"$folder/env/bin/pip" install -q transformers==5.24.0
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, attn_implementation="eager",
)
first, second = torch.arange(1, 9)[None], torch.arange(20, 28)[None]
row = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(8), torch.arange(8)])[None]


@torch.no_grad()
def mixed(model):
    """How far the second document's logits in the row are from those that it has alone, beside their size."""
    alone = model.eval()(second, use_cache=False).logits
    packed = model(row, position_ids=positions, use_cache=False).logits[:, 8:]
    return ((packed - alone).abs().max() / alone.abs().max()).item()


torch.manual_seed(0)
qwen3 = mixed(Qwen3ForCausalLM(Qwen3Config(**sizes)))
rope = {"rope_type": "default", "rope_theta": 150000.0}
experts = dict(num_local_experts=2, num_experts_per_tok=1)
gpt_oss = mixed(GptOssForCausalLM(GptOssConfig(**sizes, **experts, rope_parameters=rope)))
print(f"the second of two packed documents, against itself alone: Qwen3 {qwen3:.1e}, GPT-OSS {gpt_oss:.1e}")
assert qwen3 < 1e-5 and gpt_oss > 1e-3
PYTHON
