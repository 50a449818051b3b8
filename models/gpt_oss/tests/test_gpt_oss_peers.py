"""GPT-OSS as megatron-core 0.16 names its weights."""

from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from core.testing.peer_models import converted
from core.testing.toy import on_cpu, randomise
from gpt_oss.configs import gpt_oss_debug
from gpt_oss.model import GptOss

BLOCK = {
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm.weight",
    "self_attention.linear_proj.weight": "attention.wo.weight",
    "self_attention.linear_proj.bias": "attention.wo.bias",
    "self_attention.core_attention.softmax_offset": "attention.sinks",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "mlp.router.weight": "moe.router.gate.weight",
    "mlp.router.bias": "moe.router.gate.bias",
    "mlp.experts.experts.linear_fc2.weight": "moe.experts.w2.weight",
    "mlp.experts.experts.linear_fc2.bias": "moe.experts.w2.bias",
}


def qkv(ours: dict[str, torch.Tensor], at: str, kind: str, n_groups: int) -> torch.Tensor:
    """Of each key/value head its queries, its key and its value."""
    parts = [ours[f"{at}.attention.{w}.{kind}"].unflatten(0, (n_groups, -1)) for w in ("wq", "wk", "wv")]
    return torch.cat(parts, 1).flatten(0, 1)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_megatron(alone: bool, tmp_path: Path) -> None:
    """All blocks are alike and lie along an axis; `alone`, blocks, experts and halves are tensors one by one."""
    config = gpt_oss_debug().model
    model = on_cpu(config)
    randomise(model, seed=3)
    ours = model.state_dict()
    blocks = []
    for i in range(config.n_layers):
        at = f"layers.{i}"
        block = {theirs: ours[f"{at}.{name}"] for theirs, name in BLOCK.items()}
        for kind in ("weight", "bias"):
            block[f"self_attention.linear_qkv.{kind}"] = qkv(ours, at, kind, config.attention.n_kv_heads)
            gate, up = (ours[f"{at}.moe.experts.{w}.{kind}"] for w in ("w1", "w3"))
            block[f"mlp.experts.experts.linear_fc1.{kind}"] = torch.cat([gate, up], 1)
        blocks.append(block)
    theirs = {
        "embedding.word_embeddings.weight": ours["tok_embeddings.weight"],
        "decoder.final_layernorm.weight": ours["norm.weight"],
        "output_layer.weight": ours["output.weight"],
    }
    if not alone:
        theirs |= {f"decoder.layers.{name}": torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    for i, block in enumerate(blocks if alone else []):
        for name, value in block.items():
            if "experts.experts" not in name:
                theirs[f"decoder.layers.{i}.{name}"] = value
                continue
            for e, one in enumerate(value):
                key = f"decoder.layers.{i}.{name.replace('experts.experts', f'experts.experts.{e}')}"
                halves = zip(("_w", "_v"), one.chunk(2), strict=True) if "linear_fc1" in name else [("", one)]
                theirs |= {key + end: half for end, half in halves}
    dcp.save(theirs, storage_writer=dcp.FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    found = converted("megatron", tmp_path, config, {"gpt_oss": GptOss}).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())
