"""DeepSeek-V3 and V2 against their published numbers and against transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_deepseek import MSCALE, PLAIN, UNEVEN, YARN, HuggingFace, drawn, v2, v3
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.balance import routers
from core.nn.mla import MLA
from core.nn.module import Flops
from core.runtime.meta import meta_model
from core.testing.balance_suite import BalanceSuite
from core.testing.model_suite import ModelSuite, assert_same_logits, random_tokens
from core.testing.toy import on_cpu, randomise
from core.weights.folder import hf_config
from core.weights.hf import load_hf, save_hf
from deepseek_v3 import configs
from deepseek_v3.model import SIZES, DeepSeekV3, size


class TestDeepSeekV3(ModelSuite, BalanceSuite):
    decoder = DeepSeekV3
    configs = configs
    debug = "deepseek_v3_debug"
    golden = Path(__file__).parent / "golden"
    sizes = {name: size(name) for name in SIZES}
    parameters = {
        "debug": 1_876_480,
        "16B": 15_706_484_224,
        "236B": 235_741_434_880,
        "671B": 671_026_404_352,
    }
    # With D the width, L blocks of which d are dense, N heads of plain width s, rotated width r and value width v,
    # latents of q and c, F the hidden width of the dense network, E experts of width W of which a token meets k and h
    # shared ones, V the vocabulary, and S = 4096 tokens in a row, a token costs forward and backward
    #   matmul    = 6 (L A + d 3 D F + (L - d) (D E + 3 D W (k + h)) + V D)     2 forward, 4 backward for each weight
    #           A = D q + q N (s + r) + D (c + r) + c N (s + v) + N v D         or D N (s + r) + ... without q
    #   attention = 6 L N (s + r + v) S                          q k^T and p v, 2 S each per head and width, three times
    # debug: A = 8192 + 12288 + 6144 + 8192 + 16384 = 51200, 4 A = 204800; dense 147456; experts 3 (1024 + 110592)
    # = 334848; V D = 262144: 6 * 949248 = 5695488
    flops = {
        "debug": Flops(5_695_488, 31_457_280),
        "16B": Flops(14_707_851_264, 3_397_386_240),
        "236B": Flops(125_104_619_520, 60_397_977_600),
        "671B": Flops(219_747_581_952, 61_404_610_560),
    }
    products = {
        "dense": "wq_a wq_b* wkv_a wkv_b* wo w1* w3 w2*",
        "dense, one matrix for queries": "wq wkv_a* wkv_b wo* w1 w3* w2",
        "sparse": "wq_a wq_b* wkv_a wkv_b* wo gate* w1 w3 w2 w1* w3 w2*",
        "sparse, one matrix for queries": "wq wkv_a* wkv_b wo* gate* w1 w3 w2 w1 w3* w2",
    }
    spread = v3(vocab_size=62, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8)
    hf_model = HuggingFace
    hf_configs = {
        "v3": v3(),
        "v3_no_q_latent": v3(q_lora_rank=None),
        "v3_one_group": v3(n_group=1, topk_group=1),
        "v3_all_groups": v3(n_group=2, topk_group=2, num_experts_per_tok=3),
        "v3_two_shared": v3(n_shared_experts=2),
        "v3_all_sparse": v3(first_k_dense_replace=0),
        "v3_all_dense": v3(first_k_dense_replace=2),
        "v3_unnormalised": v3(norm_topk_prob=False, routed_scaling_factor=1.0),
        "v3_narrow_values": v3(v_head_dim=6),
        "v3_wide_values": v3(v_head_dim=40),
        "v3_one_head": v3(num_attention_heads=1, num_key_value_heads=1, qk_rope_head_dim=2),
        "v3_tied": v3(tie_word_embeddings=True),
        "v3_plain": v3(rope_parameters=PLAIN),
        "v3_yarn": v3(rope_parameters=YARN),
        "v3_yarn_uneven": v3(rope_parameters=UNEVEN),
        "v3_yarn_exact": v3(rope_parameters={**MSCALE, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}),
        "v2": v2(),
        "v2_no_q_latent": v2(q_lora_rank=None),
        "v2_greedy": v2(topk_method="greedy", n_group=1, topk_group=1, n_shared_experts=2),
        "v2_scaled": v2(routed_scaling_factor=16.0, num_experts_per_tok=1, topk_group=3),
        "v2_narrow_values": v2(v_head_dim=6, rope_parameters=UNEVEN),
        "v2_all_sparse": v2(first_k_dense_replace=0, rope_parameters=YARN),
        "v2_tied": v2(tie_word_embeddings=True, rope_parameters=PLAIN),
        **{f"drawn_{seed}": drawn(seed) for seed in range(6)},
    }


def test_every_flop_of_the_formula() -> None:
    """The sum of the comment above, number by number."""
    for name, expected in TestDeepSeekV3.flops.items():
        row = SIZES[name]
        width, n, dense, vocab = (row["shape"][key] for key in ("dim", "n_layers", "n_dense_layers", "vocab_size"))
        dims = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        heads, q, c, s, r, v = (row["heads"][key] for key in ("n_heads", *dims))
        hidden, shared, w = row["dense_dim"], row["n_shared_experts"], row["expert_dim"]
        n_experts, top_k = row["router"]["n_experts"], row["router"]["top_k"]
        queries = width * heads * (s + r) if q is None else width * q + q * heads * (s + r)
        attention = queries + width * (c + r) + c * heads * (s + v) + heads * v * width
        sparse = width * n_experts + 3 * width * w * (top_k + shared)
        matmul = 6 * (n * attention + dense * 3 * width * hidden + (n - dense) * sparse + vocab * width)
        assert Flops(matmul, 6 * n * heads * (s + r + v) * 4096) == expected


@pytest.mark.parametrize("tiny", ["v3", "v3_all_groups", "v3_all_sparse", "v3_unnormalised", "drawn_1", "drawn_5"])
def test_selection_bias_takes_part(tiny: str, tmp_path: Path) -> None:
    """It is read and written, and changes the choice there as here."""
    hf_config = TestDeepSeekV3.hf_configs[tiny]
    config = DeepSeekV3.from_hf_config(hf_config.to_dict())
    ours, again = on_cpu(config), on_cpu(config)
    randomise(ours, seed=1)
    save_hf(ours, tmp_path / "unbiased")
    generator = torch.Generator().manual_seed(2)
    for router in routers(ours).values():
        assert router.selection_bias is not None
        router.selection_bias.uniform_(-0.2, 0.2, generator=generator)
    save_hf(ours, tmp_path / "ours")
    theirs = HuggingFace.from_pretrained(tmp_path / "ours")
    assert_same_logits(ours, theirs, config)
    theirs.save_pretrained(tmp_path / "theirs")
    load_hf(again, tmp_path / "theirs")
    assert_same_logits(again, theirs, config)
    unbiased, tokens_BL = HuggingFace.from_pretrained(tmp_path / "unbiased"), random_tokens(config)
    with torch.no_grad():
        assert (ours(tokens_BL) - unbiased(tokens_BL).logits).abs().max() > 1e-3


@pytest.mark.parametrize("tiny", ["v3", "v2"])
def test_reads_experts_in_one_tensor(tiny: str, tmp_path: Path) -> None:
    """The form that newer versions of transformers hold in memory."""
    theirs = HuggingFace(TestDeepSeekV3.hf_configs[tiny]).eval()
    randomise(theirs, seed=3)
    tensors = dict(theirs.state_dict())
    assert any(key.endswith("experts.gate_up_proj") for key in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = DeepSeekV3.from_hf_config(theirs.config.to_dict())
    ours = on_cpu(config)
    load_hf(ours, tmp_path)
    assert_same_logits(ours, theirs, config)


@pytest.mark.parametrize(
    ("name", "temperature"), [("671B", 0.1 * math.log(40) + 1), ("16B", 0.0707 * math.log(40) + 1)]
)
def test_yarn_is_active(name: str, temperature: float) -> None:
    """Stretched frequencies and a temperature, in the softmax and not in the rotation, however short the rows are."""
    config = getattr(configs, f"deepseek_v3_{name.lower()}")()
    config.training.seq_len = 1024
    validate(config)
    model = meta_model(config.model)
    assert model.config.max_seq_len == 163_840
    assert model.rope.amplitude == 1.0
    attention = model.layers["0"].attention
    assert isinstance(attention, MLA)
    assert attention.softmax_scale == pytest.approx(192**-0.5 * temperature**2, rel=1e-12)
    # transformers computes these for a config.json of either model
    found = model.rope.inverse_frequency.double()
    expected = {0: 1.0, 1: 0.7498942017555237, 3: 0.4216965138912201, 28: 7.905694474175107e-06}
    expected |= {31: 3.3338035336782923e-06, 16: 0.0055000004358589}
    for i, frequency in expected.items():
        assert found[i].item() == pytest.approx(frequency, rel=1e-6), i
    assert found.sum().item() == pytest.approx(3.9489362656597677, rel=1e-6)


PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""DeepSeek-V3's own."""
V2_LITE = {name: value for name, value in PUBLISHED.items() if name != "num_nextn_predict_layers"} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {**PUBLISHED["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


def test_reads_the_published_settings() -> None:
    """V3's `config.json` keeps V2's weight of the balance loss; the paper gives a tenth of it, and so do we."""
    expected = size("671B")
    expected.n_mtp_layers = 1
    expected.moe.router.balance_loss_coeff = 1e-3
    assert DeepSeekV3.from_hf_config(PUBLISHED) == expected
    assert DeepSeekV3.from_hf_config(V2_LITE) == size("16B")
    assert DeepSeekV3.from_hf_config(V2) == size("236B")


KIMI = PUBLISHED | {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": {**PUBLISHED["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
"""Kimi K2's settings, whose YaRN has one border: pairs are stretched or not."""
MOONLIGHT = V2_LITE | {
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "vocab_size": 163840,
}


@pytest.mark.parametrize("stated", [KIMI, MOONLIGHT], ids=["kimi_k2", "moonlight"])
def test_reads_kin_of_deepseek_v3(stated: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(stated))
    config = hf_config(DeepSeekV3, tmp_path)
    validate(config)
    theirs = DeepseekV3Config(**{key: value for key, value in stated.items() if key != "model_type"})
    if stated is KIMI:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
        rope = config.rope.build(head_dim=64)
        torch.testing.assert_close(rope.inverse_frequency, frequencies, rtol=1e-6, atol=0)
        assert rope.amplitude == amplitude
    written = meta_model(config).to_hf_config()
    assert written["model_type"] == "deepseek_v3"
    assert DeepSeekV3.from_hf_config(written) == config


def test_balance_and_look_ahead_are_those_of_the_paper() -> None:
    """Section 4.2 of arXiv:2412.19437, as training began; no `config.json` states them."""
    config = configs.deepseek_v3_671b_mtp().model
    router = config.moe.router
    assert (router.load_balance_coeff, router.balance_loss_coeff, config.mtp_loss_weight) == (1e-3, 1e-4, 0.3)


def test_writes_the_published_settings() -> None:
    for stated in (PUBLISHED, V2_LITE, V2):
        written = meta_model(DeepSeekV3.from_hf_config(stated)).to_hf_config()
        skipped = {
            "rope_scaling",
            "ep_size",
            "pretraining_tp",
            "initializer_range",
            "use_cache",
            "transformers_version",
        }
        skipped |= {"bos_token_id", "eos_token_id", "torch_dtype"}
        for key in stated.keys() - skipped:
            assert written[key] == stated[key], key
        scaling = {key: value for key, value in stated["rope_scaling"].items() if key != "type"}
        assert scaling.items() <= written["rope_scaling"].items()
        assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize(
    ("stated", "change", "message"),
    [
        (PUBLISHED, {"attention_bias": True}, "attention_bias is True, not False"),
        (PUBLISHED, {"model_type": "llama"}, "not one of deepseek_v3: model_type is 'llama'"),
        (PUBLISHED, {"rope_interleave": False}, "rope_interleave is False, not True"),
        (PUBLISHED, {"scoring_func": "softmax"}, "scoring_func is 'softmax', not 'sigmoid'"),
        (PUBLISHED, {"topk_method": "greedy"}, "topk_method is 'greedy', not 'noaux_tc'"),
        (PUBLISHED, {"moe_layer_freq": 2}, "moe_layer_freq is 2, not 1"),
        (PUBLISHED, {"seq_aux": False}, "seq_aux is False, not True"),
        (PUBLISHED, {"num_key_value_heads": 8}, "num_key_value_heads 8 is not num_attention_heads 128"),
        (PUBLISHED, {"rope_scaling": {**YARN, "mscale": 1.0}}, "one of mscale and mscale_all_dim"),
        (PUBLISHED, {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "one of mscale and mscale_all_dim"),
        (V2, {"norm_topk_prob": True}, "not one of deepseek_v2: norm_topk_prob is True, not False"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', not 'softmax'"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
    ],
)
def test_unsupported_is_an_error(stated: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeepSeekV3.from_hf_config(stated | change)


NEEDED = """
    first_k_dense_replace hidden_size intermediate_size kv_lora_rank max_position_embeddings model_type
    moe_intermediate_size n_group n_routed_experts n_shared_experts norm_topk_prob num_attention_heads
    num_experts_per_tok num_hidden_layers qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_theta
    routed_scaling_factor tie_word_embeddings topk_group v_head_dim vocab_size
"""


@pytest.mark.parametrize("key", NEEDED.split())
def test_a_missing_key_is_named(key: str) -> None:
    for hf in ({name: value for name, value in PUBLISHED.items() if name != key}, PUBLISHED | {key: None}):
        with pytest.raises(UserError, match=key):
            DeepSeekV3.from_hf_config(hf)


def test_no_latent_for_queries_must_be_stated() -> None:
    with pytest.raises(UserError, match="does not state q_lora_rank"):
        DeepSeekV3.from_hf_config({name: value for name, value in PUBLISHED.items() if name != "q_lora_rank"})
    assert DeepSeekV3.from_hf_config(PUBLISHED | {"q_lora_rank": None}).attention.q_lora_rank is None
    with pytest.raises(UserError, match="does not state topk_method"):
        DeepSeekV3.from_hf_config({name: value for name, value in V2.items() if name != "topk_method"})


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("16B", "moe.router.load_balance_coeff", 1e-3, "no selection bias: this model's would be lost"),
        ("16B", "moe.router.normalise", True, "deepseek_v2 .*moe.router.normalise is True"),
        ("16B", "n_mtp_layers", 1, "n_mtp_layers is 1"),
        ("236B", "moe.router.group_score", "sum_of_two", "group_score is 'sum_of_two', there always 'max'"),
        ("671B", "moe.router.group_score", "max", "group_score is 'max', there always 'sum_of_two'"),
        ("671B", "moe.router.load_balance_coeff", None, "set load_balance_coeff"),
        ("671B", "moe.router.bias", True, "moe.router.bias is True"),
        ("671B", "moe.experts.bias", True, "moe.experts.bias is True"),
        ("671B", "moe.experts.activation", "clamped_swiglu", "activation is 'clamped_swiglu'"),
        ("671B", "rope.layout", "half", "rope.layout is 'half'"),
        ("671B", "moe.shared_experts", None, "hidden_dim None is no multiple of moe.experts.hidden_dim 2048"),
        ("671B", "moe.shared_experts.hidden_dim", 3000, "hidden_dim 3000 is no multiple"),
    ],
)
def test_what_hugging_face_cannot_express_is_an_error(name: str, path: str, value: Any, message: str) -> None:
    config = size(name)
    config.n_layers, config.n_dense_layers = 2, 1
    owner: Any = config
    *above, last = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    setattr(owner, last, value)
    with pytest.raises(UserError, match=message):
        meta_model(config).to_hf_config()


@pytest.mark.parametrize("n_dense_layers", [-1, 5])
def test_dense_blocks_are_some_of_the_blocks(n_dense_layers: int) -> None:
    config = size("debug")
    config.n_dense_layers = n_dense_layers
    with pytest.raises(UserError, match=f"n_dense_layers {n_dense_layers} must be from 0 to n_layers 4"):
        validate(config)
