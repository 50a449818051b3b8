"""Qwen3 with experts against its published numbers and against transformers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.balance import equal_balance_coeff, routers, start_step
from core.nn.module import Flops
from core.runtime.meta import meta_model
from core.testing.balance_suite import BalanceSuite
from core.testing.model_suite import ModelSuite, assert_same_logits, random_tokens
from core.testing.toy import on_cpu, randomise
from core.weights.hf import load_hf, save_hf
from qwen3 import configs
from qwen3.model import MOE_SIZES, Qwen3, Qwen3MoE, size

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


def tiny(**changes: Any) -> Qwen3MoeConfig:
    """A Qwen3 of two blocks, of the width 32, 128 tokens and 8 experts, but for the changes."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN,
    }
    return Qwen3MoeConfig(**{**settings, **changes})


def drawn(seed: int) -> Qwen3MoeConfig:
    """A tiny Qwen3 with experts, and with everything about it drawn at random."""
    draw = random.Random(seed)
    n_kv_heads = draw.choice([1, 2, 3])
    n_experts = draw.randrange(3, 14)
    return tiny(
        vocab_size=draw.randrange(50, 200),
        hidden_size=draw.choice([24, 40, 64]),
        moe_intermediate_size=4 * draw.randrange(3, 15),  # transformers' grouped product wants whole 16 bytes
        num_hidden_layers=draw.choice([1, 3]),
        num_attention_heads=n_kv_heads * draw.choice([1, 2, 5]),
        num_key_value_heads=n_kv_heads,
        head_dim=draw.choice([2, 6, 16, 32]),
        num_experts=n_experts,
        num_experts_per_tok=draw.randrange(2, n_experts // 2 + 2),
        norm_topk_prob=draw.random() < 0.5,
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=10.0 ** -draw.randrange(3, 7),
        rope_parameters={**draw.choice([PLAIN, YARN]), "rope_theta": 10.0 ** draw.randrange(2, 7)},
    )


class TestQwen3MoE(ModelSuite, BalanceSuite):
    decoder = Qwen3MoE
    configs = configs
    debug = "qwen3_moe_debug"
    golden = Path(__file__).parent / "golden"
    sizes = {name: size(name) for name in MOE_SIZES}
    parameters = {"moe_debug": 1_910_144, "30B-A3B": 30_532_122_624, "235B-A22B": 235_093_634_560}
    # With D the width, L blocks, N query and K key/value heads of width H, E experts of the hidden width F, of which a
    # token takes T, V the vocabulary, and S = 4096 tokens in a row, a token costs forward and backward
    #   matmul    = 6 (L (D (2 N H + 2 K H) + D E + 3 T D F) + V D)    2 forward and 4 backward for each weight in use
    #   attention = 12 L N H S                                         q k^T and p v, 2 S N H each, three times
    # moe_debug: L (..) = 4 (128 (256 + 128) + 2048 + 73728) = 499712, V D = 262144: 6 * 761856 = 4571136
    # 30B-A3B:   L (..) = 48 (2048 (8192 + 1024) + 262144 + 37748736) = 2730491904, V D = 311164928: 6 * 3041656832
    flops = {
        "moe_debug": Flops(4_571_136, 25_165_824),
        "30B-A3B": Flops(18_249_940_992, 9_663_676_416),
        "235B-A22B": Flops(129_405_812_736, 37_849_399_296),
    }
    products = {0: "wq wk* wv wo* gate* w1 w3 w2"}
    spread = tiny(vocab_size=62, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    hf_model = Qwen3MoeForCausalLM
    hf_configs = {
        "untied": tiny(),
        "tied": tiny(tie_word_embeddings=True),
        "not_normalised": tiny(norm_topk_prob=False),
        "one_expert_each": tiny(num_experts_per_tok=1, norm_topk_prob=False),
        "all_experts": tiny(num_experts=4, num_experts_per_tok=4),
        "many_experts": tiny(num_experts=40, num_experts_per_tok=8),
        "one_kv_head": tiny(num_attention_heads=6, num_key_value_heads=1),
        "no_groups": tiny(num_key_value_heads=4),
        "narrow_heads": tiny(head_dim=6),
        "yarn": tiny(rope_parameters=YARN),
        "biases": tiny(attention_bias=True),
        **{f"drawn_{seed}": drawn(seed) for seed in range(4)},
    }


def test_reads_fused_experts(tmp_path: Path) -> None:
    """The form that transformers holds in memory: one tensor for all experts, gate above up."""
    theirs = Qwen3MoeForCausalLM(tiny()).eval()
    randomise(theirs, seed=1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    ours = on_cpu(Qwen3MoE.from_hf_config(theirs.config.to_dict()))
    load_hf(ours, tmp_path)
    assert_same_logits(ours, theirs, ours.config)


PUBLISHED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""What version 4 of transformers wrote for the 30B size."""


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name != key}


def test_reads_version_4() -> None:
    config = Qwen3MoE.from_hf_config(PUBLISHED)
    validate(config)
    assert config == size("30B-A3B")
    wide = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536}
    assert Qwen3MoE.from_hf_config(PUBLISHED | wide) == size("235B-A22B")


def test_reads_version_5() -> None:
    new = {name: value for name, value in PUBLISHED.items() if name not in ("rope_theta", "num_experts")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_local_experts": 128}
    assert Qwen3MoE.from_hf_config(new) == size("30B-A3B")


def test_without_a_stated_balance_loss_there_is_none() -> None:
    config = Qwen3MoE.from_hf_config(without("router_aux_loss_coef"))
    assert config.moe.router.balance_loss_coeff == 0.0


def test_both_versions_read_ours(tmp_path: Path) -> None:
    """Version 4 knows the number of experts as num_experts alone, version 5 by both names."""
    stated = meta_model(size("moe_debug")).to_hf_config()
    assert stated["num_experts"] == 16
    assert Qwen3MoeConfig(**stated).num_local_experts == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, not 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], not \[\]"),
        ({"use_sliding_window": True}, "use_sliding_window is True, not False"),
        ({"model_type": "qwen3"}, "not one of qwen3_moe: model_type is 'qwen3'"),
    ],
)
def test_unsupported_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Qwen3MoE.from_hf_config(PUBLISHED | change)


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"])
def test_a_missing_key_is_named(key: str) -> None:
    for hf in (without(key), PUBLISHED | {key: None}):
        with pytest.raises(UserError, match=key):
            Qwen3MoE.from_hf_config(hf)


def test_what_hugging_face_has_no_name_for_is_not_exported(tmp_path: Path) -> None:
    config = Qwen3MoE.from_hf_config(tiny().to_dict())
    config.moe.router.load_balance_coeff = 1e-3
    with pytest.raises(UserError, match="moe.router.load_balance_coeff is 0.001, there always None"):
        save_hf(on_cpu(config), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    dense = size("debug")
    dense.attention.output_bias, dense.attention.window = False, 64
    said = "qwen3 .*: attention.output_bias is False, there always True; attention.window is 64"
    with pytest.raises(UserError, match=said):
        meta_model(dense).to_hf_config()


def test_the_balance_loss_of_equal_strength(tmp_path: Path) -> None:
    """In one block and one row transformers' loss and ours differ by a factor; its advice has it."""
    theirs = Qwen3MoeForCausalLM(tiny(num_hidden_layers=1)).train()
    randomise(theirs, seed=1)
    theirs.save_pretrained(tmp_path)
    config = Qwen3MoE.from_hf_config(theirs.config.to_dict())
    router = config.moe.router
    router.balance_loss_coeff = equal_balance_coeff(1.0, top_k=router.top_k, n_layers=1)
    ours = on_cpu(config).train()
    load_hf(ours, tmp_path)
    tokens_BL = random_tokens(config)[:1]
    start_step(ours, tokens_BL.numel())
    (ours(tokens_BL).sum() * 0).backward()
    theirs(tokens_BL, output_router_logits=True).aux_loss.backward()
    (found,) = routers(ours).values()
    expected = theirs.model.layers[0].mlp.gate.weight.grad
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.gate.weight.grad, expected)
    advice = Qwen3MoE.hf_form().advice(Qwen3MoE.from_hf_config(PUBLISHED))
    assert advice.endswith("--model.moe.router.balance_loss_coeff 0.000167")
    assert not Qwen3MoE.hf_form().advice(Qwen3MoE.from_hf_config(PUBLISHED | {"router_aux_loss_coef": 0.0}))


@torch.no_grad()
def test_all_experts_of_one_weight_are_the_dense_model(tmp_path: Path) -> None:
    """A mixture whose experts are equal is the network that each of them is, however the router chooses."""
    config = Qwen3MoE.from_hf_config(tiny().to_dict())
    mixed = on_cpu(config)
    randomise(mixed, seed=1)
    hf = {**mixed.to_hf_config(), "model_type": "qwen3", "intermediate_size": config.moe.experts.hidden_dim}
    dense = on_cpu(Qwen3.from_hf_config(hf))
    state = {name: value for name, value in mixed.state_dict().items() if ".moe." not in name}
    for name, value in mixed.state_dict().items():
        if ".experts." in name:
            value[:] = value[:1].clone()
            state[name.replace("moe.experts", "feed_forward")] = value[0]
    dense.load_state_dict(state)
    tokens_BL = random_tokens(config)
    torch.testing.assert_close(mixed(tokens_BL), dense(tokens_BL), rtol=0, atol=1e-5)
