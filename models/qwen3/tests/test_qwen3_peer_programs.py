"""Qwen3 as torchtitan and litgpt themselves write it. `nox -s peers` installs them; nothing needs a GPU."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from core.testing.peer_models import assert_same_logits, converted, draw, written_by_megatron
from qwen3.model import Qwen3, Qwen3MoE

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings of other programs are theirs
MODELS = {"qwen3": Qwen3, "qwen3_moe": Qwen3MoE}
STATED = dict(
    model_type="qwen3", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, vocab_size=2048, hidden_size=256,
    num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072,
    max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture
def titan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchtitan's sizes; its kernels want Triton when they are imported, and are not used here."""
    monkeypatch.setitem(sys.modules, "torchtitan.distributed.minimal_async_ep.kernels", MagicMock())
    from torchtitan.models import qwen3

    return qwen3.qwen3_configs


def saved(config: Any, folder: Path) -> nn.Module:
    """A drawn model of torchtitan with two blocks, which it wrote."""
    from torchtitan.components.checkpoint import ModelWrapper
    from torchtitan.models.common.attention import ScaledDotProductAttention

    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    draw(model, 0.05)
    dcp.save(ModelWrapper(model).state_dict(), checkpoint_id=folder, no_dist=True)
    return model


@pytest.mark.parametrize("flavor", ["debugmodel", "debugmodel_non_fused_qkv"])
def test_torchtitan(flavor: str, titan: Any, tmp_path: Path) -> None:
    model = saved(titan[flavor]("flex"), tmp_path / "theirs")
    assert_same_logits(converted("dcp", tmp_path, Qwen3.from_hf_config(STATED), MODELS), model, 5e-5)


def test_torchtitan_with_experts(titan: Any, tmp_path: Path) -> None:
    """It computes experts in bfloat16 everywhere, so the values are compared."""
    model = saved(titan["debugmodel_moe"]("flex"), tmp_path / "theirs")
    stated = STATED | dict(
        model_type="qwen3_moe", num_experts=64, num_experts_per_tok=8, norm_topk_prob=True, moe_intermediate_size=768,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = Qwen3MoE.from_hf_config(stated)
    config.moe.router.load_balance_coeff = 1e-3
    found = converted("dcp", tmp_path, config, MODELS).state_dict()
    theirs = model.state_dict()
    for w, axes in (("w1", "EFD"), ("w2", "EDF"), ("w3", "EFD")):
        expected = theirs[f"layers.1.moe.routed_experts.inner_experts.{w}_{axes}"]
        assert torch.equal(found[f"layers.1.moe.experts.{w}.weight"], expected)
    assert torch.equal(found["layers.0.moe.router.gate.weight"], theirs["layers.0.moe.router.gate.weight"])


@pytest.mark.parametrize(("alone", "n_mtp"), [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_megatron_with_experts(alone: bool, n_mtp: int, tmp_path: Path) -> None:
    """Its model is built and saved, but does not run, on a CPU: the values are compared."""
    sizes = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2, "qk_layernorm": True}
    sizes |= {"mtp_num_layers": n_mtp} if n_mtp else {}
    theirs = written_by_megatron(tmp_path, alone=alone, num_layers=3, ffn_hidden_size=24, **sizes)
    stated = STATED | dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=24,
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = Qwen3MoE.from_hf_config(stated)
    config.n_mtp_layers = n_mtp
    found = converted("megatron", tmp_path, config, MODELS).state_dict()
    for name, place in (("enorm", "enorm"), ("hnorm", "hnorm"), ("eh_proj", "eh_proj"), ("norm", "final_layernorm")):
        assert n_mtp == 0 or torch.equal(found[f"ahead.3.{name}.weight"], theirs[f"mtp.layers.0.{place}.weight"])
    for i in range(3 + n_mtp):
        at, ours = f"decoder.layers.{i}" if i < 3 else "mtp.layers.0.transformer_layer", f"layers.{i}"
        assert torch.equal(found[f"{ours}.moe.router.gate.weight"], theirs[f"{at}.mlp.router.weight"])
        assert torch.equal(found[f"{ours}.ffn_norm.weight"], theirs[f"{at}.pre_mlp_layernorm.weight"])
        assert torch.equal(found[f"{ours}.attention.q_norm.weight"], theirs[f"{at}.self_attention.q_layernorm.weight"])
        for e in range(4):
            expert = f"{at}.mlp.experts.local_experts.{e}"
            gate, up = theirs[f"{expert}.linear_fc1.weight"].split(24)
            assert torch.equal(found[f"{ours}.moe.experts.w1.weight"][e], gate)
            assert torch.equal(found[f"{ours}.moe.experts.w3.weight"][e], up)
            assert torch.equal(found[f"{ours}.moe.experts.w2.weight"][e], theirs[f"{expert}.linear_fc2.weight"])


def test_litgpt(tmp_path: Path) -> None:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config

    config = Config(
        name="tiny", n_layer=2, n_embd=256, n_head=16, n_query_groups=8, head_size=128, vocab_size=2048,
        block_size=4096, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=1e-6, norm_qk=True, mlp_class_name="LLaMAMLP", intermediate_size=3072, rope_base=1000000,
    )  # fmt: skip
    model = GPT(config)
    draw(model, 0.05)
    (tmp_path / "theirs").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "theirs/lit_model.pth")
    save_config(config, tmp_path / "theirs")
    ours = converted("litgpt", tmp_path, Qwen3.from_hf_config(STATED | {"tie_word_embeddings": False}), MODELS)
    assert_same_logits(ours, model, 5e-5)
