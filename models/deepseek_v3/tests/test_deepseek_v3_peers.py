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


MTP = ("transformer_layer", "mtp_model_layer")
AHEAD = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "final_layernorm"}


def block_of(ours: dict[str, torch.Tensor], i: int, at: str, norms: str, *, alone: bool) -> dict[str, torch.Tensor]:
    """The weights of our block `i` as Megatron names them below `at`; `alone` has experts and halves one by one."""
    theirs = {}
    for name, place in (ATTENTION | NORMS[norms]).items():
        theirs[f"{at}.self_attention.{place}"] = ours[f"layers.{i}.attention.{name}"]
    theirs[f"{at}.input_layernorm.weight"] = ours[f"layers.{i}.attention_norm.weight"]
    theirs[f"{at}.pre_mlp_layernorm.weight"] = ours[f"layers.{i}.ffn_norm.weight"]

    def gated(place: str, w1: torch.Tensor, w3: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{place}_w": w1, f"{place}_v": w3} if alone else {place: torch.cat([w1, w3], -2)}

    kinds = {"feed_forward": "", "moe.experts": ".experts.experts", "moe.shared_experts": ".shared_experts"}
    for kind, place in kinds.items():
        if (w1 := ours.get(f"layers.{i}.{kind}.w1.weight")) is None:
            continue
        w2, w3 = (ours[f"layers.{i}.{kind}.{w}.weight"] for w in ("w2", "w3"))
        if alone and kind == "moe.experts":
            for e in range(len(w1)):
                theirs |= gated(f"{at}.mlp{place}.{e}.linear_fc1.weight", w1[e], w3[e])
                theirs[f"{at}.mlp{place}.{e}.linear_fc2.weight"] = w2[e]
        else:
            theirs |= gated(f"{at}.mlp{place}.linear_fc1.weight", w1, w3)
            theirs[f"{at}.mlp{place}.linear_fc2.weight"] = w2
    if f"layers.{i}.moe.router.gate.weight" in ours:
        theirs[f"{at}.mlp.router.weight"] = ours[f"layers.{i}.moe.router.gate.weight"]
        theirs[f"{at}.mlp.router.expert_bias"] = ours[f"layers.{i}.moe.router.selection_bias"]
    return theirs


@pytest.mark.parametrize(
    ("norms", "alone", "n_mtp"),
    [("plain", False, 0), ("joined", False, 0), ("plain", True, 0), ("plain", False, 1), ("joined", True, 2)],
)
def test_megatron(norms: str, alone: bool, n_mtp: int, tmp_path: Path) -> None:
    """A dense block and a sparse one have numbers; what is ahead of them is passed over unless the model has it."""
    config = DeepSeekV3.from_hf_config(v3().to_dict())
    config.n_mtp_layers = n_mtp
    model = on_cpu(config)
    randomise(model, seed=1)
    ours = model.state_dict()
    theirs = {
        "embedding.word_embeddings.weight": ours["tok_embeddings.weight"],
        "decoder.final_layernorm.weight": ours["norm.weight"],
        "output_layer.weight": ours["output.weight"],
        f"mtp.layers.{n_mtp}.enorm.weight": torch.ones(32),
    }
    for i in range(2):
        theirs |= block_of(ours, i, f"decoder.layers.{i}", norms, alone=alone)
    for i in range(n_mtp):
        at = f"mtp.layers.{i}"
        theirs |= block_of(ours, 2 + i, f"{at}.{MTP[i]}", norms, alone=alone)
        for name, place in AHEAD.items():
            theirs[f"{at}.{place}.weight"] = ours[f"ahead.{2 + i}.{name}.weight"]
    dcp.save(theirs, storage_writer=dcp.FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    found = converted("megatron", tmp_path, config, {"deepseek_v3": DeepSeekV3}).state_dict()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())


def test_megatron_with_all_blocks_alike(tmp_path: Path) -> None:
    """Those lie along an axis; the one ahead of them has a number all the same."""
    hf = v3().to_dict() | {"first_k_dense_replace": 0}
    config = DeepSeekV3.from_hf_config(hf)
    config.n_mtp_layers = 1
    model = on_cpu(config)
    randomise(model, seed=2)
    ours = model.state_dict()
    blocks = [block_of(ours, i, "decoder.layers", "plain", alone=False) for i in range(2)]
    theirs = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    theirs |= block_of(ours, 2, "mtp.layers.0.transformer_layer", "plain", alone=False)
    for name, place in AHEAD.items():
        theirs[f"mtp.layers.0.{place}.weight"] = ours[f"ahead.2.{name}.weight"]
    theirs["embedding.word_embeddings.weight"] = ours["tok_embeddings.weight"]
    theirs["decoder.final_layernorm.weight"] = ours["norm.weight"]
    theirs["output_layer.weight"] = ours["output.weight"]
    dcp.save(theirs, storage_writer=dcp.FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    found = converted("megatron", tmp_path, config, {"deepseek_v3": DeepSeekV3}).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())
