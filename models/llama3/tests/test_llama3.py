"""Llama 3 against its published numbers and against transformers."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.module import Flops
from core.runtime.meta import meta_model
from core.testing.model_suite import ModelSuite, random_tokens
from core.testing.toy import on_cpu, randomise
from core.weights.hf import load_hf
from llama3 import configs, hf
from llama3.model import SIZES, Llama3, size

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}


def tiny(**changes: Any) -> LlamaConfig:
    """A Llama of two blocks, of the width 32 and 128 tokens, but for the changes."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": SCALED,
    }
    return LlamaConfig(**{**settings, **changes})


def drawn(seed: int) -> LlamaConfig:
    """A tiny Llama with everything about it drawn at random."""
    draw = random.Random(seed)
    n_kv_heads = draw.choice([1, 2, 3])
    n_heads = n_kv_heads * draw.choice([1, 2, 5])
    scaled = {**SCALED, "factor": draw.uniform(2, 40), "high_freq_factor": draw.uniform(2, 6)}
    return tiny(
        vocab_size=draw.randrange(50, 200),
        hidden_size=n_heads * draw.choice([6, 8]),  # transformers wants a multiple, though it does not need one
        intermediate_size=draw.randrange(16, 100),
        num_hidden_layers=draw.choice([1, 3]),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=draw.choice([2, 6, 16, 32]),
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=10.0 ** -draw.randrange(3, 7),
        rope_parameters=draw.choice([scaled, YARN, PLAIN]),
    )


class TestLlama3(ModelSuite):
    decoder = Llama3
    configs = configs
    debug = "llama3_debug"
    golden = Path(__file__).parent / "golden"
    sizes = {name: size(name) for name in SIZES}
    parameters = {
        "debug": 1_311_872,
        "1B": 1_235_814_400,
        "3B": 3_212_749_824,
        "8B": 8_030_261_248,
        "70B": 70_553_706_496,
        "405B": 405_853_388_800,
    }
    # With D the width, L blocks, N query and K key/value heads of width H, F the hidden width, V the vocabulary, and
    # S = 4096 tokens in a row, a token costs forward and backward
    #   matmul    = 6 (L (D (2 N H + 2 K H) + 3 D F) + V D)     2 forward and 4 backward for each weight, head included
    #   attention = 12 L N H S                                  q k^T and p v, 2 S N H each, three times
    # 8B: L (..) = 32 (4096 (8192 + 2048) + 176160768) = 6979321856, V D = 525336576: 6 * 7504658432 = 45027950592
    flops = {
        "debug": Flops(6_291_456, 25_165_824),
        "1B": Flops(7_414_480_896, 1_610_612_736),
        "3B": Flops(19_275_448_320, 4_227_858_432),
        "8B": Flops(45_027_950_592, 6_442_450_944),
        "70B": Flops(417_010_286_592, 32_212_254_720),
        "405B": Flops(2_422_487_384_064, 101_468_602_368),
    }
    products = {0: "wq wk* wv wo* w1 w3* w2"}
    spread = tiny(
        vocab_size=62, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False
    )
    hf_model = LlamaForCausalLM
    hf_configs = {
        "scaled": tiny(),
        "tied": tiny(tie_word_embeddings=True),
        "unscaled": tiny(rope_parameters=PLAIN),
        "biases": tiny(attention_bias=True),
        "one_kv_head": tiny(hidden_size=48, num_attention_heads=6, num_key_value_heads=1),
        "no_groups": tiny(num_key_value_heads=4),
        **{f"drawn_{seed}": drawn(seed) for seed in range(3)},
    }


PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""What version 4 of transformers wrote for the 8B size of Llama 3.1, which does not state head_dim."""


FIRST = {
    "architectures": ["LLaMAForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
"""What the first Llama stated, when it came to transformers."""


def test_reads_what_transformers_assumes_of_the_first_llama() -> None:
    """Its own class says the same of that file, and of one that states null."""
    for stated in (FIRST, FIRST | {"num_key_value_heads": None, "rope_scaling": None, "tie_word_embeddings": False}):
        config = Llama3.from_hf_config(stated)
        validate(config)
        assert config == Llama3.from_hf_config(LlamaConfig(**stated).to_dict())
        assert (config.attention.n_kv_heads, config.attention.head_dim, config.rope.theta) == (32, 128, 10_000.0)
        assert (config.max_seq_len, config.tie_embeddings) == (2048, False)
    assert Llama3.from_hf_config(FIRST | {"rope_parameters": {"rope_theta": 5e5}}).rope.theta == 5e5


SMALL = {"rope_scaling": {**PUBLISHED["rope_scaling"], "factor": 32.0}, "tie_word_embeddings": True}
OTHERS = {
    "8B": {},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "405B": {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128},
    "1B": SMALL | {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64},
    "3B": SMALL
    | {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
    | {"head_dim": 128},
}
"""What the sizes of 3.1, and those of 3.2, state otherwise."""


@pytest.mark.parametrize("name", OTHERS)
def test_reads_the_published_configs(name: str) -> None:
    config = Llama3.from_hf_config(PUBLISHED | OTHERS[name])
    validate(config)
    assert config == size(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias is True, not False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope type "linear" is not supported'),
        ({"model_type": "qwen3"}, "not one of llama: model_type is 'qwen3'"),
    ],
)
def test_unsupported_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Llama3.from_hf_config(PUBLISHED | change)


@pytest.mark.parametrize(
    ("path", "value"),
    {
        "n_mtp_layers": 1,
        "rope.layout": "half",
        "attention.qk_norm": True,
        "attention.output_bias": False,
        "attention.sinks": True,
        "attention.window": 64,
    }.items(),
)
def test_what_hugging_face_has_no_name_for_is_not_exported(path: str, value: Any) -> None:
    config = size("debug")
    owner, _, field = path.rpartition(".")
    setattr(getattr(config, owner) if owner else config, field, value)
    with pytest.raises(UserError, match=f"llama of Hugging Face cannot be this model: {path} is {value!r}"):
        meta_model(config).to_hf_config()


@torch.no_grad()
def test_rows_must_be_reordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the order of the rows the logits are wrong by little, which a casual look would miss."""
    theirs = LlamaForCausalLM(tiny()).eval()
    randomise(theirs, seed=1)
    theirs.save_pretrained(tmp_path)
    ours = on_cpu(Llama3.from_hf_config(theirs.config.to_dict()))
    monkeypatch.setattr(hf, "FORM", replace(hf.FORM, halves=frozenset()))
    load_hf(ours, tmp_path)
    tokens_BL = random_tokens(ours.config)
    assert (ours(tokens_BL) - theirs(tokens_BL).logits).abs().max() > 1e-3
