"""Qwen3 against its published numbers and against transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.module import Flops
from core.nn.rope import RoPE
from core.runtime.meta import meta_model
from core.testing.model_suite import ModelSuite, assert_same_logits
from core.testing.toy import on_cpu, randomise
from core.weights.folder import load_folder
from core.weights.hf import save_hf
from qwen3 import configs
from qwen3.model import SIZES, Qwen3, size

LLAMA = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


def tiny(**changes: Any) -> Qwen3Config:
    """A Qwen3 of two blocks, of the width 32 and 128 tokens, but for the changes."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "rope_parameters": PLAIN,
    }
    return Qwen3Config(**{**settings, **changes})


def drawn(seed: int) -> Qwen3Config:
    """A tiny Qwen3 with everything about it drawn at random."""
    draw = random.Random(seed)
    n_kv_heads = draw.choice([1, 2, 3])
    return tiny(
        vocab_size=draw.randrange(50, 200),
        hidden_size=draw.choice([24, 40, 64]),
        intermediate_size=draw.randrange(16, 100),
        num_hidden_layers=draw.choice([1, 3]),
        num_attention_heads=n_kv_heads * draw.choice([1, 2, 5]),
        num_key_value_heads=n_kv_heads,
        head_dim=draw.choice([2, 6, 16, 32]),
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=10.0 ** -draw.randrange(3, 7),
        rope_parameters={**draw.choice([PLAIN, LLAMA, YARN]), "rope_theta": 10.0 ** draw.randrange(2, 7)},
    )


class TestQwen3(ModelSuite):
    decoder = Qwen3
    configs = configs
    debug = "qwen3_debug"
    golden = Path(__file__).parent / "golden"
    sizes = {name: size(name) for name in SIZES}
    parameters = {
        "debug": 1_049_984,
        "0.6B": 596_049_920,
        "1.7B": 1_720_574_976,
        "4B": 4_022_468_096,
        "8B": 8_190_735_360,
        "14B": 14_768_307_200,
        "32B": 32_762_123_264,
    }
    # With D the width, L blocks, N query and K key/value heads of width H, F the hidden width, V the vocabulary, and
    # S = 4096 tokens in a row, a token costs forward and backward
    #   matmul    = 6 (L (D (2 N H + 2 K H) + 3 D F) + V D)     2 forward and 4 backward for each weight, head included
    #   attention = 12 L N H S                                  q k^T and p v, 2 S N H each, three times
    # debug: L (..) = 4 (128 (256 + 128) + 147456) = 786432, V D = 262144: 6 * 1048576 = 6291456
    flops = {
        "debug": Flops(6_291_456, 25_165_824),
        "0.6B": Flops(3_575_906_304, 2_818_572_288),
        "1.7B": Flops(10_322_706_432, 2_818_572_288),
        "4B": Flops(24_133_632_000, 7_247_757_312),
        "8B": Flops(45_408_583_680, 7_247_757_312),
        "14B": Flops(83_939_819_520, 10_066_329_600),
        "32B": Flops(191_901_204_480, 25_769_803_776),
    }
    products = {0: "wq wk* wv wo* w1 w3* w2"}
    spread = tiny(
        vocab_size=62, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True
    )
    hf_model = Qwen3ForCausalLM
    hf_configs = {
        "tied": tiny(),
        "untied": tiny(tie_word_embeddings=False),
        "one_kv_head": tiny(num_attention_heads=6, num_key_value_heads=1),
        "no_groups": tiny(num_key_value_heads=4),
        "narrow_heads": tiny(head_dim=4),
        "wide_heads": tiny(head_dim=64, tie_word_embeddings=False),
        "llama": tiny(rope_parameters=LLAMA),
        "yarn": tiny(rope_parameters=YARN),
        "biases": tiny(attention_bias=True),
        "yarn_exact": tiny(rope_parameters={**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}),
        "yarn_mscale": tiny(rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
        **{f"drawn_{seed}": drawn(seed) for seed in range(4)},
    }


PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""What version 4 of transformers wrote for the 0.6B size; the context beyond 40,960 positions is left to the user."""
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name != key}


def test_reads_version_4() -> None:
    config = Qwen3.from_hf_config(PUBLISHED)
    validate(config)
    assert config == size("0.6B")


OTHERS = {  # name: width, blocks, query heads, feed-forward, tied
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_reads_the_other_sizes(name: str) -> None:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "tie_word_embeddings")
    assert Qwen3.from_hf_config(PUBLISHED | dict(zip(keys, OTHERS[name], strict=True))) == size(name)


def test_reads_version_5() -> None:
    new = without("rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
    assert Qwen3.from_hf_config(new) == size("0.6B")


def test_reads_scaling_of_both_versions() -> None:
    """The long context that Qwen3's model cards give: yarn, four times 32,768 positions."""
    expected = RoPE.Config(theta=1e6, scaling="yarn", scaling_factor=4.0, original_seq_len=32768)
    old = PUBLISHED | {"rope_scaling": SCALED}
    older = PUBLISHED | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    new = without("rope_theta") | {"rope_parameters": {**SCALED, "rope_theta": 1e6, "attention_factor": 1.1386294361}}
    for hf in (old, older, new):
        config = Qwen3.from_hf_config(hf)
        validate(config)
        assert config.rope == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True, not False"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, not 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"model_type": "llama"}, "not one of qwen3: model_type is 'llama'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, '"longrope" is not supported'),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, '"dynamic" is not supported'),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, '"linear" is not supported'),
        ({"rope_scaling": {**SCALED, "attention_factor": 1.0}}, r"attention_factor 1.0 is not the 1.1386"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 is not supported"),
    ],
)
def test_unsupported_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Qwen3.from_hf_config(PUBLISHED | change)


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(UserError, match="hidden_act is 'gelu'.*use_sliding_window is True"):
        Qwen3.from_hf_config(PUBLISHED | {"hidden_act": "gelu", "use_sliding_window": True})


@torch.no_grad()
def test_a_qwen2_has_biases_but_on_its_output_and_does_not_normalise_its_heads(tmp_path: Path) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(tiny(), name) for name in names} | {"num_key_value_heads": 2, "rope_parameters": PLAIN}
    theirs = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).eval()
    randomise(theirs, seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = on_cpu(Qwen3.from_hf_config(json.loads((tmp_path / "theirs/config.json").read_text())))
    load_folder(ours, tmp_path / "theirs")
    assert_same_logits(ours, theirs, ours.config)
    save_hf(ours, tmp_path / "again")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ours.config)


def test_what_no_qwen_has_is_not_exported() -> None:
    config = size("debug")
    config.attention.qk_norm = False
    with pytest.raises(UserError, match="a qwen2 of Hugging Face cannot be this model: .*attention.bias is False"):
        meta_model(config).to_hf_config()


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "rope_theta",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    for hf in (without(key), PUBLISHED | {key: None}):
        with pytest.raises(UserError, match=key):
            Qwen3.from_hf_config(hf)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_missing_rotary_key_is_named(key: str) -> None:
    scaling = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(UserError, match=key):
        Qwen3.from_hf_config(PUBLISHED | {"rope_scaling": scaling})
