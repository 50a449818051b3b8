"""Folders as others leave them: under other names, quantised by others, with files of an earlier save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.testing.toy import Toy, on_cpu, randomise
from core.weights.folder import load_folder
from core.weights.hf import save_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed.weight", "head.weight"


def toy(seed: int, *, tied: bool = False) -> Decoder:
    model = on_cpu(Toy.Config(tie_embeddings=tied))
    randomise(model, seed)
    return model


def saved(
    folder: Path, names: dict[str, str] | None = None, *, tied: bool = False, **more: Tensor
) -> dict[str, Tensor]:
    """Write the toy of seed 1 with other beginnings of its keys; returns its weights."""
    model = toy(1, tied=tied)
    save_hf(model, folder)
    tensors = load_file(folder / SINGLE)
    for old, new in (names or {}).items():
        tensors = {new + key.removeprefix(old) if key.startswith(old) else key: each for key, each in tensors.items()}
    save_file(tensors | more, folder / SINGLE)
    return model.state_dict()


def assert_read(folder: Path, expected: dict[str, Tensor], *, tied: bool = False) -> None:
    model = toy(9, tied=tied)
    load_folder(model, folder)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(toy(9), folder)
    return str(caught.value)


def test_keys_of_a_model_that_was_saved_without_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = saved(tmp_path, {"model.": ""}, tied=True)
    assert "embed.weight" in load_file(tmp_path / SINGLE)
    with caplog.at_level("INFO", "armature"):
        assert_read(tmp_path, expected, tied=True)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: keys are read under other names, blocks.0.")
    assert f"{HEAD} is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        {"": "module."},
        {"": "language_model."},
        {"model.": "model.language_model."},
        {"": "_orig_mod.module."},
    ],
)
def test_keys_of_a_model_in_another(tmp_path: Path, names: dict[str, str]) -> None:
    assert_read(tmp_path, saved(tmp_path, names))


def test_a_model_beside_another_in_a_third_is_named(tmp_path: Path) -> None:
    saved(tmp_path, {"": "language_model."}, **{"vision.blocks.0.q.weight": torch.ones(2)})
    said = f"{tmp_path} holds this model inside another: its keys begin with 'language_model.', and beside them stand "
    assert refusal(tmp_path) == f"{said}vision.blocks.0.q.weight: save that part alone as a folder"


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq (bits 4)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq (bits 4)"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "compressed-tensors (format 'float-quantized')",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8 (weight_block_size None)"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8 (weight_block_size [64, 64])"),
    ],
)
def test_a_scheme_that_is_not_decoded_is_named(tmp_path: Path, stated: dict[str, Any], said: str) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    assert f"{tmp_path}/config.json: the weights are quantised by {said}, not decoded here: only fp8" in refusal(
        tmp_path
    )


@pytest.mark.parametrize(
    "stated", [{"quant_method": "mxfp4"}, {"quant_method": "fp8", "weight_block_size": [128, 128]}]
)
def test_a_scheme_that_is_decoded_is_read(tmp_path: Path, stated: dict[str, Any]) -> None:
    expected = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    assert_read(tmp_path, expected)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight.absmax", "bitsandbytes"),
        ("weight_scale", "fp8 or int8 with a scale for a tensor or a row"),
    ],
)
def test_a_scheme_that_only_the_keys_tell_is_named_in_one_line(tmp_path: Path, end: str, said: str) -> None:
    key = f"model.blocks.0.q.{end}"
    saved(tmp_path, **{key: torch.ones(2)})
    message = refusal(tmp_path)
    assert f"{tmp_path}: {key} is of weights that are quantised by {said}" in message and len(message.splitlines()) == 1


def test_a_whole_file_goes_before_a_stale_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers: another save left the index and its files."""
    save_hf(toy(5), tmp_path, shard_gib=5000 / 2**30)
    assert (tmp_path / INDEX).exists()
    expected = toy(1).state_dict()
    save_hf(toy(1), tmp_path / "new")
    (tmp_path / "new" / SINGLE).rename(tmp_path / SINGLE)
    assert_read(tmp_path, expected)
    said = f"{tmp_path}: {SINGLE} is read, as transformers does, and nothing that the index beside it names"
    assert caplog.messages == [said]


def test_an_index_may_name_the_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = saved(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(tmp_path / SINGLE), SINGLE)}))
    assert_read(tmp_path, expected)
    assert caplog.messages == []
