"""Folders of our own: what is written can be read, and a folder of another kind is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config.errors import UserError
from core.config.record import from_json
from core.nn.decoder import Decoder
from core.testing.toy import Toy, on_cpu, randomise
from core.weights.folder import load_folder, load_weights, save_weights
from core.weights.hf import save_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Other(Toy):
    """Another decoder with the same weights."""


def drawn(config: Decoder.Config, seed: int = 1) -> Decoder:
    model = on_cpu(config)
    randomise(model, seed)
    return model


def assert_same(model: Decoder, other: Decoder) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_gib", [5.0, 4000 / 2**30])
def test_what_is_written_can_be_read(tmp_path: Path, tied: bool, shard_gib: float) -> None:
    model = drawn(Toy.Config(tie_embeddings=tied))
    save_weights(model, tmp_path, shard_gib=shard_gib)
    assert from_json((tmp_path / "config.json").read_text()) == model.config
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (tmp_path / INDEX).exists() == (len(files) > 1) == (shard_gib < 1)
    stored = {name: value for file in files for name, value in load_file(file).items()}
    assert stored.keys() == model.state_dict().keys() - ({"output.weight"} if tied else set())
    for read in (load_weights, load_folder):
        other = drawn(Toy.Config(tie_embeddings=tied), seed=9)
        read(other, tmp_path)
        assert_same(other, model)


def test_weights_are_cast(tmp_path: Path) -> None:
    model = drawn(Toy.Config())
    save_weights(model, tmp_path, dtype=torch.bfloat16)
    for name, value in load_file(tmp_path / SINGLE).items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name


def test_either_kind_of_folder_is_recognised(tmp_path: Path) -> None:
    model, other = drawn(Toy.Config()), drawn(Toy.Config(), seed=9)
    save_hf(model, tmp_path)
    load_folder(other, tmp_path)
    assert_same(other, model)


@pytest.mark.parametrize("save", [save_hf, save_weights])
def test_a_model_that_computes_something_else_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, save: Callable[[Decoder, Path], None]
) -> None:
    """Its weights fit all the same, as those of a Qwen3 of 2507 fit an older one, which has another rope base."""
    save(drawn(Toy.Config()), tmp_path)
    other = drawn(Toy.Config(norm_eps=1e-3, max_seq_len=32), seed=9)
    other.config.rope.theta = 5e5
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_folder(other, tmp_path)
    first, *lines, fix = str(caught.value).splitlines()
    assert first == f"{tmp_path}: the weights are of a model with"
    assert lines == ["  norm_eps 1e-06, not 0.001", "  rope.theta 10000.0, not 500000.0"]
    assert fix == (
        f"take that model (--model.from {tmp_path} in training, no --config in generate), or these settings "
        "nevertheless: allow_model_change"
    )
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())
    load_folder(other, tmp_path, allow_model_change=True)
    assert_same(other, drawn(Toy.Config()))
    assert [line.partition("with ")[2] for line in caplog.messages] == [
        "max_seq_len 64, not 32",
        "norm_eps 1e-06, not 0.001",
        "rope.theta 10000.0, not 500000.0",
    ]


def test_what_does_not_change_what_weights_compute_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_weights(drawn(Toy.Config()), tmp_path)
    load_folder(drawn(Toy.Config(max_seq_len=32)), tmp_path)
    assert caplog.messages == [f"{tmp_path}: the weights are of a model with max_seq_len 64, not 32"]


def test_a_hugging_face_folder_of_another_family(tmp_path: Path) -> None:
    """Its weights have the right names and shapes, as those of a Mistral have for a Llama."""
    save_hf(drawn(Toy.Config()), tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"model_type": "mistral"}, "this config.json is not one of toy: model_type is 'mistral', not 'toy'"),
        ({"hidden_size": None}, "this config.json does not state hidden_size"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**stated, **changes}))
        refused(tmp_path, f"^{tmp_path / 'config.json'}: {message}$", load_folder)


def refused(folder: Path, message: str, *ways: Callable[[Decoder, Path], None]) -> None:
    model, before = drawn(Toy.Config(), seed=9), drawn(Toy.Config(), seed=9)
    for read in ways or (load_folder, load_weights):
        with pytest.raises(UserError, match=message):
            read(model, folder)
        assert_same(model, before)


def test_a_folder_that_holds_no_weights(tmp_path: Path) -> None:
    refused(tmp_path, "config.json cannot be read: No such file")
    for text, message in {
        "{": "config.json is not JSON",
        "[]": "config.json is no JSON object",
        "{}": "states no class: this is no folder of our weights",
        '{"class": "core.train.trainer:Trainer", "model": {}}': "states no class",  # it trains models of many classes
        '{"class": "a_stranger.trainer:Odd", "model": {}}': "config.json: a_stranger.trainer:Odd is code of the module",
        '{"class": "core.train.trainer:Trainer"}': "has no weights, just the config.json of core.train.trainer:Trainer",
    }.items():
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, message)


def test_weights_of_another_model(tmp_path: Path) -> None:
    save_weights(drawn(Other.Config()), tmp_path)
    refused(tmp_path, r"holds the weights of test_weights:Other, not of core.testing.toy:Toy")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_weights(drawn(Toy.Config()), tmp_path)
    stored = load_file(tmp_path / SINGLE)
    del stored["norm.weight"]
    save_file(stored | {"extra": torch.ones(1), "output.weight": torch.ones(3, 2)}, tmp_path / SINGLE)
    refused(
        tmp_path,
        rf"{SINGLE}: extra is unknown to Toy\n"
        rf"  {SINGLE}: output.weight has shape \[3, 2\], the model wants \[64, 16\]\n"
        r"  norm.weight is missing",
    )


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = drawn(Toy.Config())
    save_weights(model, tmp_path)
    with pytest.raises(UserError, match="already holds safetensors files: choose another folder"):
        save_weights(drawn(Toy.Config(), seed=9), tmp_path)
    load_folder(model, tmp_path)
    assert_same(model, drawn(Toy.Config()))
    assert json.loads((tmp_path / "config.json").read_text())["class"] == "core.testing.toy:Toy"
