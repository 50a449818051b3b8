"""Mixture-of-experts checkpoints as transformers writes them: every tensor of ours by a hand-written expression."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from weight_trees import N_LAYERS, Weights

from core.config.errors import UserError
from core.weights.hf import check_hf, load_hf, save_hf
from core.weights.keys import KeyTable, Stacked, below

SINGLE = "model.safetensors"
EXPERTS: KeyTable = {
    "moe.experts.w1.weight": ("mlp.experts.{e}.gate_proj.weight", Stacked("mlp.experts.gate_up_proj", "first")),
    "moe.experts.w3.weight": ("mlp.experts.{e}.up_proj.weight", Stacked("mlp.experts.gate_up_proj", "second")),
    "moe.experts.w2.weight": ("mlp.experts.{e}.down_proj.weight", Stacked("mlp.experts.down_proj")),
}
FUSED: KeyTable = {
    "moe.experts.w1.weight": Stacked("mlp.experts.gate_up_proj", "even", transposed=True),
    "moe.experts.w1.bias": Stacked("mlp.experts.gate_up_proj_bias", "even"),
    "moe.experts.w3.weight": Stacked("mlp.experts.gate_up_proj", "odd", transposed=True),
    "moe.experts.w3.bias": Stacked("mlp.experts.gate_up_proj_bias", "odd"),
    "moe.experts.w2.weight": Stacked("mlp.experts.down_proj", transposed=True),
    "moe.experts.w2.bias": Stacked("mlp.experts.down_proj_bias"),
}
BIAS = "mlp.gate.e_score_correction_bias"
TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=N_LAYERS, num_attention_heads=4, num_key_value_heads=2
)
LIBRARY: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TINY, head_dim=8, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **TINY | {"num_key_value_heads": 4},
            **dict(kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10),
            **dict(intermediate_size=48, moe_intermediate_size=24, n_routed_experts=4, n_group=2, topk_group=1),
            **dict(num_experts_per_tok=2, first_k_dense_replace=1),
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**TINY | {"hidden_size": 64}, head_dim=8, intermediate_size=96, num_local_experts=4)
    ),
}


def library(family: str, folder: Path) -> dict[str, Tensor]:
    """The tensors that transformers writes for a tiny model with drawn weights."""
    model = LIBRARY[family]()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if "inv_freq" not in name:
            value.normal_(generator=generator)
    model.save_pretrained(folder)
    return load_file(folder / SINGLE)


def ours(family: str, tensors: dict[str, Tensor]) -> tuple[KeyTable, dict[str, Tensor]]:
    """A key table, and the our weights, for these tensors: the experts by hand, all else under the same name."""
    rest = [key for key in tensors if ".experts." not in key]
    table: dict[str, Any] = {key: key for key in rest}
    expected = {key: tensors[key] for key in rest}
    for i in range(N_LAYERS):
        there = f"model.layers.{i}.mlp.experts."
        if not any(key.startswith(there) for key in tensors):
            continue
        here = f"layers.{i}.moe.experts."
        n_experts = len(tensors[f"model.layers.{i}.mlp.{'router' if family == 'gpt_oss' else 'gate'}.weight"])
        if family == "gpt_oss":
            gate_up, bias = tensors[there + "gate_up_proj"], tensors[there + "gate_up_proj_bias"]
            expected[here + "w1.weight"] = gate_up[:, :, 0::2].permute(0, 2, 1)
            expected[here + "w3.weight"] = gate_up[:, :, 1::2].permute(0, 2, 1)
            expected[here + "w2.weight"] = tensors[there + "down_proj"].permute(0, 2, 1)
            expected[here + "w1.bias"], expected[here + "w3.bias"] = bias[:, 0::2], bias[:, 1::2]
            expected[here + "w2.bias"] = tensors[there + "down_proj_bias"]
        else:
            for name, key in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
                parts = [tensors[f"{there}{e}.{key}.weight"] for e in range(n_experts)]
                expected[f"{here}{name}.weight"] = torch.stack(parts)
    table = {name.replace(".0.", ".{i}.").replace(".1.", ".{i}."): key for name, key in table.items()}
    table = {name: key.replace(".0.", ".{i}.").replace(".1.", ".{i}.") for name, key in table.items()}
    table |= below("layers.{i}", "model.layers.{i}", FUSED if family == "gpt_oss" else EXPERTS)
    return table, expected


def empty(family: str, tensors: dict[str, Tensor]) -> Weights:
    """A model for these tensors that holds other values."""
    table, expected = ours(family, tensors)
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    return Weights(table, shapes, tuple(name for name in shapes if name.endswith(BIAS)))


def assert_holds(model: Weights, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def put(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder with these tensors in one file."""
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / SINGLE)
    return folder


def refused(model: Weights, folder: Path, *messages: str) -> None:
    """The folder is refused with these lines, and no weight is changed."""
    before = model.values()
    with pytest.raises(UserError) as caught:
        load_hf(model, folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == f"{folder} does not fit the model:"
    assert lines[1:] == sorted(messages)
    assert_holds(model, before)


@pytest.mark.parametrize("family", LIBRARY)
def test_reads_and_writes_as_transformers(family: str, tmp_path: Path) -> None:
    tensors = library(family, tmp_path / "theirs")
    model = empty(family, tensors)
    load_hf(model, tmp_path / "theirs")
    assert_holds(model, ours(family, tensors)[1])
    save_hf(model, tmp_path / "ours")
    assert (tmp_path / "ours" / SINGLE).read_bytes() == (tmp_path / "theirs" / SINGLE).read_bytes()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_reads_the_fused_form(family: str, tmp_path: Path) -> None:
    """transformers itself fuses: a model of its own holds the tensors that way in memory."""
    tensors = library(family, tmp_path / "theirs")
    theirs = type(LIBRARY[family]()).from_pretrained(tmp_path / "theirs")
    fused = theirs.state_dict()
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused and len(fused) < len(tensors)
    model = empty(family, tensors)
    load_hf(model, put(tmp_path / "fused", fused))
    assert_holds(model, ours(family, tensors)[1])


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of GPT-OSS as it was published: drawn blocks and scales for the two projections of the experts.

    In `tensors` those are replaced by what transformers makes of the blocks and scales.
    """
    generator = torch.Generator().manual_seed(2)
    packed = dict(tensors)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, columns, rows = packed.pop(key).shape
        shape = n_experts, rows, columns // 32, 16
        blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 140, shape[:-1], generator=generator, dtype=torch.uint8)
        packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        tensors[key] = convert_moe_packed_tensors(blocks, scales)
        assert tensors[key].shape == (n_experts, columns, rows)
    return packed


def test_reads_published_gpt_oss(tmp_path: Path) -> None:
    tensors = library("gpt_oss", tmp_path / "theirs")
    packed = published(tensors)
    model = empty("gpt_oss", tensors)
    load_hf(model, put(tmp_path / "packed", packed))
    assert_holds(model, ours("gpt_oss", tensors)[1])


def test_a_router_bias_is_not_cast(tmp_path: Path) -> None:
    tensors = library("deepseek_v3", tmp_path / "theirs")
    model = empty("deepseek_v3", tensors)
    load_hf(model, tmp_path / "theirs")
    save_hf(model, tmp_path / "cast", dtype=torch.bfloat16)
    cast = load_file(tmp_path / "cast" / SINGLE)
    assert cast.keys() == tensors.keys()
    for key, value in cast.items():
        kept = key.endswith(BIAS)
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(value, tensors[key] if kept else tensors[key].bfloat16()), key


E1 = "model.layers.1.mlp.experts."


def test_a_missing_expert(tmp_path: Path) -> None:
    tensors = library("qwen3_moe", tmp_path / "theirs")
    model = empty("qwen3_moe", tensors)
    del tensors[f"{E1}3.up_proj.weight"]
    refused(model, put(tmp_path / "bad", tensors), f"{E1}3.up_proj.weight is missing")
    tensors = {key: value for key, value in tensors.items() if not key.startswith(E1)}
    refused(
        model,
        put(tmp_path / "bad", tensors),
        f"{E1}0.gate_proj.weight is missing, and 4 more that make up layers.1.moe.experts.w1.weight",
        f"{E1}0.up_proj.weight is missing, and 4 more that make up layers.1.moe.experts.w3.weight",
        f"{E1}0.down_proj.weight is missing, and 4 more that make up layers.1.moe.experts.w2.weight",
    )


def test_an_expert_too_many_or_of_another_shape(tmp_path: Path) -> None:
    tensors = library("qwen3_moe", tmp_path / "theirs")
    model = empty("qwen3_moe", tensors)
    tensors[f"{E1}5.up_proj.weight"] = torch.ones(24, 32)
    tensors[f"{E1}2.down_proj.weight"] = torch.ones(24, 32)
    refused(
        model,
        put(tmp_path / "bad", tensors),
        f"{SINGLE}: {E1}5.up_proj.weight is unknown to Weights",
        f"{SINGLE}: {E1}2.down_proj.weight has shape [24, 32], the model wants [32, 24]",
    )


def test_fused_and_single_experts_at_once(tmp_path: Path) -> None:
    tensors = library("qwen3_moe", tmp_path / "theirs")
    model = empty("qwen3_moe", tensors)
    tensors[f"{E1}gate_up_proj"] = torch.ones(5, 48, 32)
    refused(
        model,
        put(tmp_path / "bad", tensors),
        *(
            f"layers.1.moe.experts.{name}.weight is given twice: {SINGLE}: {E1}0.{key}_proj.weight, "
            f"{SINGLE}: {E1}gate_up_proj"
            for name, key in (("w1", "gate"), ("w3", "up"))
        ),
    )


def test_fused_experts_of_another_shape(tmp_path: Path) -> None:
    tensors = library("gpt_oss", tmp_path / "theirs")
    model = empty("gpt_oss", tensors)
    for key in ("gate_up_proj", "gate_up_proj_bias", "down_proj"):
        tensors[E1 + key] = tensors[E1 + key][:, :-2]
    refused(
        model,
        put(tmp_path / "bad", tensors),
        f"{SINGLE}: {E1}gate_up_proj has shape [4, 62, 192], the model wants [4, 64, 192]",
        f"{SINGLE}: {E1}gate_up_proj_bias has shape [4, 190], the model wants [4, 192]",
        f"{SINGLE}: {E1}down_proj has shape [4, 94, 64], the model wants [4, 96, 64]",
    )


def test_blocks_without_scales_and_the_reverse(tmp_path: Path) -> None:
    tensors = library("gpt_oss", tmp_path / "theirs")
    packed = published(tensors)
    model = empty("gpt_oss", tensors)
    del packed[f"{E1}gate_up_proj_scales"], packed[f"{E1}down_proj_blocks"]
    packed["model.layers.0.mlp.experts.down_proj"] = tensors["model.layers.0.mlp.experts.down_proj"]
    refused(
        model,
        put(tmp_path / "bad", packed),
        f"{SINGLE}: {E1}gate_up_proj_blocks has no {E1}gate_up_proj_scales",
        f"{SINGLE}: {E1}down_proj_scales has no {E1}down_proj_blocks",
        f"{SINGLE}: model.layers.0.mlp.experts.down_proj cannot stand beside "
        "model.layers.0.mlp.experts.down_proj_blocks and model.layers.0.mlp.experts.down_proj_scales",
    )


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    model = Weights({f"w{i}": f"w{i}" for i in range(50)}, {f"w{i}": (2,) for i in range(50)})
    with pytest.raises(UserError, match="w35 is missing\n  and 20 more$"):
        check_hf(model, put(tmp_path, {}))
