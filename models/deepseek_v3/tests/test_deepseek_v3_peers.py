"""DeepSeek-V3 as megatron-core 0.16 writes it, by the names in a folder that it wrote. `nox -s peers` has it write
one of Qwen3."""

from pathlib import Path

import pytest
import torch
from tiny_deepseek import v3
from torch.distributed import checkpoint as dcp

from core.testing.peer_models import converted
from core.testing.toy import on_cpu, randomise
from deepseek_v3.model import DeepSeekV3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process writes
ATTENTION = {
    "wq_a.weight": "linear_q_down_proj.weight",
    "wq_b.weight": "linear_q_up_proj.weight",
    "wkv_a.weight": "linear_kv_down_proj.weight",
    "wkv_b.weight": "linear_kv_up_proj.weight",
    "wo.weight": "linear_proj.weight",
}
NORMS = {
    "plain": {"q_norm.weight": "q_layernorm.weight", "kv_norm.weight": "kv_layernorm.weight"},
    "joined": {
        "q_norm.weight": "linear_q_up_proj.layer_norm_weight",
        "kv_norm.weight": "linear_kv_up_proj.layer_norm_weight",
    },
}


@pytest.mark.parametrize("norms", NORMS)
def test_megatron(norms: str, tmp_path: Path) -> None:
    """A dense block and a sparse one have numbers; those for multi-token prediction are left where they are."""
    config = DeepSeekV3.from_hf_config(v3().to_dict())
    model = on_cpu(config)
    randomise(model, seed=1)
    ours = model.state_dict()
    theirs = {
        "embedding.word_embeddings.weight": ours["tok_embeddings.weight"],
        "decoder.final_layernorm.weight": ours["norm.weight"],
        "output_layer.weight": ours["output.weight"],
        "mtp.layers.0.enorm.weight": torch.ones(32),
    }
    for i in range(2):
        at = f"decoder.layers.{i}"
        for name, place in (ATTENTION | NORMS[norms]).items():
            theirs[f"{at}.self_attention.{place}"] = ours[f"layers.{i}.attention.{name}"]
        theirs[f"{at}.input_layernorm.weight"] = ours[f"layers.{i}.attention_norm.weight"]
        theirs[f"{at}.pre_mlp_layernorm.weight"] = ours[f"layers.{i}.ffn_norm.weight"]
    dense, sparse = "layers.0.feed_forward", "layers.1.moe"
    theirs["decoder.layers.0.mlp.linear_fc1.weight"] = torch.cat([ours[f"{dense}.{w}.weight"] for w in ("w1", "w3")])
    theirs["decoder.layers.0.mlp.linear_fc2.weight"] = ours[f"{dense}.w2.weight"]
    theirs["decoder.layers.1.mlp.router.weight"] = ours[f"{sparse}.router.gate.weight"]
    theirs["decoder.layers.1.mlp.router.expert_bias"] = ours[f"{sparse}.router.selection_bias"]
    for kind, place in (("experts", "experts.experts"), ("shared_experts", "shared_experts")):
        joined = torch.cat([ours[f"{sparse}.{kind}.{w}.weight"] for w in ("w1", "w3")], -2)
        theirs[f"decoder.layers.1.mlp.{place}.linear_fc1.weight"] = joined
        theirs[f"decoder.layers.1.mlp.{place}.linear_fc2.weight"] = ours[f"{sparse}.{kind}.w2.weight"]
    dcp.save(theirs, storage_writer=dcp.FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    found = converted("megatron", tmp_path, config, {"deepseek_v3": DeepSeekV3}).state_dict()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())
