"""GPT-OSS against its published numbers, against transformers, and out of 4-bit files."""

import random
from dataclasses import replace
from itertools import product
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.module import Flops
from core.nn.rope import inverse_frequencies
from core.runtime.meta import meta_model
from core.testing.balance_suite import BalanceSuite
from core.testing.model_suite import ModelSuite, assert_same_logits, random_tokens
from core.testing.toy import on_cpu, randomise
from core.weights.hf import load_hf, save_hf
from gpt_oss import configs
from gpt_oss.model import SIZES, GptOss, size

PLAIN = {"rope_type": "default", "rope_theta": 150_000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


def tiny(**changes: Any) -> GptOssConfig:
    """A GPT-OSS of two blocks, of the width 32 and 128 tokens, with a window of 8, but for the changes."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 8,
        "max_position_embeddings": 64,
        "rope_parameters": YARN,
    }
    return GptOssConfig(**{**settings, **changes})


def drawn(seed: int) -> GptOssConfig:
    """A tiny GPT-OSS with everything about it drawn at random."""
    draw = random.Random(seed)
    n_kv_heads = draw.choice([1, 2, 3])
    n_experts = draw.randrange(3, 12)
    scaled = {**YARN, "factor": draw.uniform(2, 40), "truncate": draw.random() < 0.5}
    return tiny(
        vocab_size=draw.randrange(50, 200),
        hidden_size=draw.choice([24, 40, 64]),
        intermediate_size=4 * draw.randrange(4, 15),  # transformers' grouped product wants rows of whole 16 bytes
        num_hidden_layers=draw.choice([1, 3, 4]),
        num_attention_heads=n_kv_heads * draw.choice([1, 2, 5]),
        num_key_value_heads=n_kv_heads,
        head_dim=draw.choice([2, 6, 16, 32]),
        num_local_experts=n_experts,
        num_experts_per_tok=draw.randrange(2, n_experts // 2 + 2),
        sliding_window=draw.randrange(2, 50),
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=10.0 ** -draw.randrange(3, 7),
        rope_parameters=draw.choice([PLAIN, scaled]),
    )


class TestGptOss(ModelSuite, BalanceSuite):
    decoder = GptOss
    configs = configs
    debug = "gpt_oss_debug"
    golden = Path(__file__).parent / "golden"
    sizes = {name: size(name) for name in SIZES}
    parameters = {"debug": 1_917_616, "20b": 20_914_757_184, "120b": 116_829_156_672}
    # With D the width, L blocks, N query and K key/value heads of width H, E experts of the hidden width F, of which a
    # token takes T, V the vocabulary, and S = 4096 tokens in a row, a token costs forward and backward
    #   matmul    = 6 (L (D (2 N H + 2 K H) + D E + 3 T D F) + V D)    2 forward and 4 backward for each weight in use
    #   attention = 12 L N H S                                         windows and causal half not subtracted
    # debug: L (..) = 4 (128 (256 + 128) + 1024 + 147456) = 790528, V D = 262144: 6 * 1052672 = 6316032
    # 20b:   L (..) = 24 (2880 (8192 + 1024) + 92160 + 99532800) = 3028008960, V D = 579133440: 6 * 3607142400
    flops = {
        "debug": Flops(6_316_032, 25_165_824),
        "20b": Flops(21_642_854_400, 4_831_838_208),
        "120b": Flops(30_786_600_960, 7_247_757_312),
    }
    products = {0: "wq wk* wv wo* gate* w1 w3 w2"}
    spread = tiny(vocab_size=62, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, sliding_window=5)
    hf_model = GptOssForCausalLM
    hf_configs = {
        "yarn": tiny(),
        "tied": tiny(tie_word_embeddings=True),
        "unscaled": tiny(rope_parameters=PLAIN),
        "yarn_rounded": tiny(rope_parameters={**YARN, "truncate": True}),
        "one_kv_head": tiny(num_attention_heads=6, num_key_value_heads=1),
        "no_groups": tiny(num_key_value_heads=4),
        "narrow_heads": tiny(head_dim=6),
        "window_of_one": tiny(sliding_window=1),
        "window_beyond": tiny(sliding_window=41, num_hidden_layers=1),
        "four_layers": tiny(num_hidden_layers=4, sliding_window=3),
        "all_experts": tiny(num_local_experts=4),
        "few_experts": tiny(num_local_experts=11, num_experts_per_tok=2),
        **{f"drawn_{seed}": drawn(seed) for seed in range(4)},
    }


def assert_equals_transformers(theirs: GptOssForCausalLM, folder: Path) -> None:
    """Save a model of transformers, load it here, and compare logits."""
    theirs.eval().save_pretrained(folder)
    ours = on_cpu(GptOss.from_hf_config(theirs.config.to_dict()))
    load_hf(ours, folder)
    assert_same_logits(ours, theirs, ours.config)


def test_one_expert_per_token_equals_transformers(tmp_path: Path) -> None:
    """Not one of the suite's: the router's weights are all 1 then, and it gets no gradient."""
    theirs = GptOssForCausalLM(tiny(num_experts_per_tok=1))
    randomise(theirs, seed=1)
    assert_equals_transformers(theirs, tmp_path)


@torch.no_grad()
def test_clamped_activations_equal_transformers(tmp_path: Path) -> None:
    """Weights so large that a good part of what experts compute is beyond 7 on either side."""
    theirs = GptOssForCausalLM(tiny())
    randomise(theirs, seed=1)
    for layer in theirs.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj *= 40
        experts.down_proj /= 10
        gate_up = torch.randn(100, 32) @ experts.gate_up_proj[0] + experts.gate_up_proj_bias[0]
        assert (gate_up > 7).float().mean() > 0.2 and (gate_up < -7).float().mean() > 0.2
    assert_equals_transformers(theirs, tmp_path)


def test_published_frequencies_equal_transformers() -> None:
    expected = GptOssRotaryEmbedding(GptOssConfig())
    rope = meta_model(size("debug")).rope
    assert rope.amplitude == pytest.approx(expected.attention_scaling, rel=1e-12)
    found = torch.tensor(inverse_frequencies(size("20b").rope, head_dim=64))
    torch.testing.assert_close(found, expected.inv_freq, rtol=1e-5, atol=0)


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def four_bits(value: float) -> int:
    """The code of the nearest 4-bit float: a sign, and the place in FP4."""
    code = min(range(8), key=lambda i: abs(FP4[i] - abs(value)))
    return code + 8 * (value < 0)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is published for a weight (E, 32 G, rows), as (blocks, scales), and the values that it stands for."""
    n_experts, n_in, n_rows = weight.shape
    blocks = torch.zeros(n_experts, n_rows, n_in // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(n_experts, n_rows, n_in // 32, dtype=torch.uint8)
    meant = torch.zeros_like(weight)
    for e, row, group in product(range(n_experts), range(n_rows), range(n_in // 32)):
        values = weight[e, 32 * group : 32 * group + 32, row].tolist()
        exponent = ceil(log2(max(map(abs, values)) / 6))
        codes = [four_bits(value / 2**exponent) for value in values]
        scales[e, row, group] = exponent + 127
        for i, (low, high) in enumerate(zip(codes[::2], codes[1::2], strict=True)):
            blocks[e, row, group, i] = low + 16 * high
        for i, code in enumerate(codes):
            meant[e, 32 * group + i, row] = FP4[code % 8] * 2**exponent * (-1 if code > 7 else 1)
    return blocks, scales, meant


def test_reads_weights_of_four_bits(tmp_path: Path) -> None:
    """The published form, and what it means in fp32 and in bf16, give the same logits bit for bit."""
    config = tiny(hidden_size=64, intermediate_size=32, num_local_experts=4)
    theirs = GptOssForCausalLM(config).eval()
    randomise(theirs, seed=1)
    theirs.bfloat16().float().save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed = {}
    for key in [key for key in plain if key.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, plain[key] = mxfp4(plain[key])
        assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), plain[key])
        packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    assert len(packed) == 2 * 2 * config.num_hidden_layers
    others = {key: value.bfloat16() for key, value in plain.items() if f"{key}_blocks" not in packed}
    (tmp_path / "bf16").mkdir()
    (tmp_path / "packed").mkdir()
    save_file({key: value.bfloat16() for key, value in plain.items()}, tmp_path / "bf16" / "model.safetensors")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(packed | others, tmp_path / "packed" / "model.safetensors")
    logits = {}
    for form in ("plain", "bf16", "packed"):
        ours = on_cpu(GptOss.from_hf_config(config.to_dict()), seed=1)
        load_hf(ours, tmp_path / form)
        logits[form] = ours(random_tokens(ours.config))
    assert torch.equal(logits["packed"], logits["plain"]) and torch.equal(logits["bf16"], logits["plain"])
    theirs = GptOssForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert_same_logits(ours, theirs, ours.config)


PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
"""What stands beside the weights of the 20b size. The coefficient is of a loss that this file switches off."""


def published(name: str) -> GptOss.Config:
    """A size with the balance loss that its published `config.json` states."""
    config = size(name)
    config.moe.router.balance_loss_coeff = 0.9
    return config


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name != key}


def test_reads_the_published_configs() -> None:
    config = GptOss.from_hf_config(PUBLISHED)
    validate(config)
    assert config == published("20b")
    wide = {
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    }
    assert GptOss.from_hf_config(PUBLISHED | wide) == published("120b")


def test_reads_version_5() -> None:
    rope = {**PUBLISHED["rope_scaling"], "rope_theta": 150_000.0}
    new = {name: value for name, value in PUBLISHED.items() if name not in ("rope_theta", "rope_scaling")}
    assert GptOss.from_hf_config(new | {"rope_parameters": rope, "swiglu_alpha": 1.702}) == published("20b")


def test_without_a_stated_balance_loss_there_is_none() -> None:
    config = GptOss.from_hf_config(without("router_aux_loss_coef"))
    assert config.moe.router.balance_loss_coeff == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": False}, "attention_bias is False, not True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"swiglu_limit": 8.0}, "swiglu_limit is 8.0, not 7.0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0, not 1.702"),
        ({"model_type": "qwen3_moe"}, "not one of gpt_oss: model_type is 'qwen3_moe'"),
        ({"layer_types": ["full_attention"] * 24}, "layer_types .* one for each of 24 layers, it states .'full_att"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 12}, "sliding_attention and full_attention in turn"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 11}, "one for each of 24 layers"),
    ],
)
def test_unsupported_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GptOss.from_hf_config(PUBLISHED | change)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "tie_word_embeddings",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "layer_types",
        "num_local_experts",
        "num_experts_per_tok",
        "rope_theta",
        "sliding_window",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    for hf in (without(key), PUBLISHED | {key: None}):
        with pytest.raises(UserError, match=key):
            GptOss.from_hf_config(hf)


def test_what_hugging_face_has_no_name_for_is_not_exported(tmp_path: Path) -> None:
    """A bias on the choice of experts would be lost; and all that stands in the way is named at once."""
    config = GptOss.from_hf_config(tiny().to_dict())
    config.moe.router.load_balance_coeff = 1e-3
    with pytest.raises(UserError, match="moe.router.load_balance_coeff is 0.001, there always None"):
        save_hf(on_cpu(config), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    config.attention = replace(config.attention, sinks=False, qk_norm=True)
    with pytest.raises(UserError, match="qk_norm is True, there always False; attention.sinks is False.*load_balance"):
        meta_model(config).to_hf_config()


def test_a_model_without_a_window_is_not_exported() -> None:
    config = GptOss.from_hf_config(tiny().to_dict())
    config.attention.window = None
    with pytest.raises(UserError, match="attention.window is None"):
        meta_model(config).to_hf_config()
