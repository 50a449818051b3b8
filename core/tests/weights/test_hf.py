"""Hugging Face folders: what is written can be read, and what does not fit is named before anything is changed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.runtime.meta import meta_model
from core.testing.toy import KEYS, Toy, on_cpu, randomise
from core.weights.hf import check_hf, load_hf, save_hf
from core.weights.hf_config import HFConfig, checked_hf_config
from core.weights.key_map import pattern_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBED, HEAD, NORM, Q1 = "model.embed.weight", "head.weight", "model.norm.weight", "model.blocks.1.q.weight"


def key_of(name: str) -> str:
    """Hugging Face's name of a weight of the toy."""
    pattern, number = pattern_of(name)
    return KEYS[pattern].replace("{i}", number)


def toy(*, tied: bool = False, seed: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    model = on_cpu(Toy.Config(tie_embeddings=tied), dtype=dtype)
    randomise(model, seed)
    return model


def values(model: Decoder) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(model: Decoder, expected: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = SINGLE) -> None:
    """Change the tensors of one file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file)


def refused(folder: Path, *messages: str, tied: bool = False) -> None:
    """The folder is refused with all messages, on memory and on the meta device, and no weight is changed."""
    model = toy(tied=tied, seed=9)
    before = values(model)
    for action in (
        lambda: load_hf(model, folder),
        lambda: check_hf(meta_model(Toy.Config(tie_embeddings=tied)), folder),
    ):
        with pytest.raises(UserError) as caught:
            action()
        for message in messages:
            assert re.search(message, str(caught.value)), f"{message!r} is not in {caught.value}"
    assert_equal(model, before)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_hf(toy(), tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_hf(toy(), tmp_path / "sharded", shard_gib=5000 / 2**30)
    return tmp_path / "sharded"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    save_hf(toy(tied=True), tmp_path / "tied")
    return tmp_path / "tied"


def test_one_file(single: Path) -> None:
    assert sorted(path.name for path in single.iterdir()) == ["config.json", SINGLE]
    expected = {key_of(name): value for name, value in values(toy()).items()}
    assert stored(single).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in stored(single).items())
    stated = {**meta_model(Toy.Config()).to_hf_config(), "dtype": "float32"}
    assert json.loads((single / "config.json").read_text()) == stated
    model = toy(seed=9)
    load_hf(model, single)
    assert_equal(model, values(toy()))


def test_several_files_with_an_index(sharded: Path, single: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {key: file.name for file in files for key in load_file(file)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored(sharded).values())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 5000
    assert stored(sharded).keys() == stored(single).keys()
    model = toy(seed=9)
    load_hf(model, sharded)
    assert_equal(model, values(toy()))


def test_the_index_decides_which_files_are_read(sharded: Path) -> None:
    save_file({"left.over": torch.ones(1)}, sharded / "old.safetensors")
    load_hf(toy(), sharded)


def test_tied_head_is_left_out_and_need_not_be_there(tied: Path) -> None:
    assert HEAD not in stored(tied) and EMBED in stored(tied)
    model = toy(tied=True, seed=9)
    load_hf(model, tied)
    assert_equal(model, values(toy(tied=True)))
    assert model.output.weight is model.tok_embeddings.weight


def test_tied_head_may_be_there(tied: Path) -> None:
    edit(tied, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    model = toy(tied=True, seed=9)
    load_hf(model, tied)
    assert_equal(model, values(toy(tied=True)))


def test_tied_head_must_not_differ(tied: Path) -> None:
    edit(tied, lambda tensors: tensors.update({HEAD: tensors[EMBED] + 1}))
    refused(tied, rf"{SINGLE}: {HEAD} differs from {EMBED}, which the model ties it to", tied=True)


def test_head_that_is_not_tied_must_be_there(tied: Path) -> None:
    refused(tied, f"{HEAD} is missing")


def test_all_keys_that_do_not_fit_are_named_at_once(single: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        tensors["model.extra.weight"] = torch.ones(2)
        tensors[Q1] = tensors[Q1].T.contiguous()
        tensors["model.blocks.2.q.weight"] = torch.ones(2)

    edit(single, change)
    refused(
        single,
        f"{NORM} is missing",
        f"{SINGLE}: model.extra.weight is unknown to Toy",
        f"{SINGLE}: model.blocks.2.q.weight is unknown to Toy",
        rf"{SINGLE}: {Q1} has shape \[16, 32\], the model wants \[32, 16\]",
    )


def test_a_key_in_two_files(sharded: Path) -> None:
    first, second = sorted(file.name for file in sharded.glob("*.safetensors"))[:2]
    edit(sharded, lambda tensors: tensors.update({EMBED: torch.ones(64, 16)}), second)
    refused(sharded, f"{EMBED} stands in {first} and in {second}")


def test_a_missing_file(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    keys = [key for key, name in index.items() if name == file.name]
    file.unlink()
    refused(sharded, f"{sharded} has no {file.name}, which the index wants for {keys[0]}, and {len(keys) - 1} more$")


def test_a_file_that_lacks_what_the_index_promises(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1].name
    [key, *_] = load_file(sharded / file)
    edit(sharded, lambda tensors: tensors.pop(key), file)
    refused(sharded, rf"\n  {key} is missing in {file}, where the index has it$")


def test_what_cannot_be_opened(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(file: Path, framework: str) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    file = sorted(sharded.glob("*.safetensors"))[0]
    with monkeypatch.context() as patch:
        patch.setattr("core.weights.files.safe_open", forbidden)
        refused(sharded, f"{file} cannot be read: .*Permission denied")
    (sharded / INDEX).unlink()
    (sharded / INDEX).mkdir()
    refused(sharded, f"{INDEX} is no regular file")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    refused(tmp_path, f"{tmp_path} has no {SINGLE}")
    refused(tmp_path / "nowhere", f"nowhere has no {SINGLE}")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(sharded: Path, kept: int) -> None:
    """The last file is cut: the first ones are whole and must not be loaded."""
    file = sorted(sharded.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    refused(sharded, f"{file} cannot be read")


@pytest.mark.parametrize("name", ["../single/model.safetensors", "sub/model.safetensors", ".."])
def test_an_index_that_leaves_the_folder(sharded: Path, single: Path, name: str) -> None:
    index = {"weight_map": dict.fromkeys(stored(single), name)}
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, re.escape(name))


def test_an_index_with_an_absolute_path(sharded: Path, single: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(stored(single), str(single / SINGLE))}))
    refused(sharded, "which is not a file beside it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", " is not JSON"),
        ("[]", " is no JSON object"),
        ("{}", r": weight_map: expected dict\[str, str\], got None"),
        ('{"weight_map": [1]}', r": weight_map: expected dict\[str, str\], got \[1\]"),
        ('{"weight_map": {"a": 1}}', ": weight_map: a: expected str, got 1"),
    ],
)
def test_an_index_that_is_none(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, f"{INDEX}{message}")


def test_nothing_is_overwritten(single: Path) -> None:
    before = (single / SINGLE).read_bytes()
    with pytest.raises(UserError, match="already holds safetensors files: choose another folder"):
        save_hf(toy(seed=9), single)
    assert (single / SINGLE).read_bytes() == before


def test_bf16_file_into_fp32_model(tmp_path: Path) -> None:
    save_hf(toy(dtype=torch.bfloat16), tmp_path)
    assert {value.dtype for value in stored(tmp_path).values()} == {torch.bfloat16}
    model = toy(seed=9)
    load_hf(model, tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert_equal(model, {name: value.float() for name, value in values(toy(dtype=torch.bfloat16)).items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_export_casts(tmp_path: Path, dtype: torch.dtype) -> None:
    source = toy(dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
    before = values(source)
    save_hf(source, tmp_path, dtype=dtype, shard_gib=5000 / 2**30)
    expected = {key_of(name): value.to(dtype) for name, value in before.items()}
    assert all(torch.equal(value, expected[key]) for key, value in stored(tmp_path).items())
    assert {value.dtype for value in stored(tmp_path).values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored(tmp_path).values())
    assert_equal(source, before)


def test_a_model_on_meta_is_checked_but_not_loaded(sharded: Path) -> None:
    model = meta_model(Toy.Config())
    files = check_hf(model, sharded)
    assert files == {key: file for file in sharded.glob("*.safetensors") for key in load_file(file)}
    with pytest.raises(AssertionError, match="materialise the model first"):
        load_hf(model, sharded)


def test_config_must_agree_where_it_speaks() -> None:
    fixed = {"model_type": "toy", "bias": False, "act": "silu"}
    hf = checked_hf_config({"model_type": "toy", "bias": False, "size": 3}, fixed)
    assert hf["size"] == 3
    with pytest.raises(UserError, match="not one of toy: model_type is 'other', not 'toy'; bias is True, not False"):
        checked_hf_config({"model_type": "other", "bias": True}, fixed)
    with pytest.raises(UserError, match="model_type is missing"):
        checked_hf_config({"bias": False}, fixed)


@pytest.mark.parametrize("hf", [{}, {"size": None}])
def test_config_names_the_key_it_lacks(hf: dict) -> None:
    with pytest.raises(UserError, match="does not state size"):
        HFConfig(hf)["size"]
