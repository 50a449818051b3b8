"""Key tables: what the places mean, what is passed over, and what is written twice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_trees import Weights

from core.config.errors import UserError
from core.weights.hf import load_hf, save_hf
from core.weights.key_map import KeyPart, hf_key_map, own_key_map, pattern_of
from core.weights.keys import KeyTable, Stacked, below

SINGLE = "model.safetensors"


class Ahead(Weights):
    """A model with two blocks and, if asked, one for the token after the next."""

    HF_IGNORED = ("*.inv_freq", "model.layers.{n_layers+i}.*")
    HF_COPIES = {"model.layers.{n_layers+i}.embed.weight": "embed.weight"}

    def __init__(self, n_ahead: int, seed: int = 9) -> None:
        table = {
            "embed.weight": "model.embed.weight",
            "layers.{i}.wq.weight": "model.layers.{i}.q.weight",
            "ahead.{i}.norm.weight": "model.layers.{i}.head.norm.weight",
        }
        shapes = {"embed.weight": (6, 4), "layers.0.wq.weight": (3, 4), "layers.1.wq.weight": (3, 4)}
        for i in range(2, 2 + n_ahead):
            shapes |= {f"ahead.{i}.norm.weight": (4,), f"layers.{i}.wq.weight": (3, 4)}
        super().__init__(table, shapes, seed=seed)


def test_names_by_the_table() -> None:
    assert pattern_of("norm.weight") == ("norm.weight", "")
    assert pattern_of("layers.12.w.weight") == ("layers.{i}.w.weight", "12")
    keys: KeyTable = {"norm.weight": "n", "layers.{i}.w.weight": "blocks.{i}.w"}
    key_map = hf_key_map(Weights(keys, {"norm.weight": (2,), "layers.12.w.weight": (2, 2)}))
    assert key_map.places == {"norm.weight": [[KeyPart("n")]], "layers.12.w.weight": [[KeyPart("blocks.12.w")]]}
    for name in ("other.weight", "layers.0.v.weight"):
        with pytest.raises(KeyError):
            hf_key_map(Weights(keys, {name: (2,)}))


def test_below_moves_both_sides() -> None:
    table: KeyTable = {"a": "x", "b": ("x.{e}", Stacked("y", "odd", transposed=True)), "c": None}
    assert below("ours.{i}", "theirs", table) == {
        "ours.{i}.a": ("theirs.x",),
        "ours.{i}.b": ("theirs.x.{e}", Stacked("theirs.y", "odd", transposed=True)),
        "ours.{i}.c": None,
    }


def test_pieces_of_each_place() -> None:
    keys: KeyTable = {
        "a": ("x.{e}", Stacked("y", "even")),
        "b": Stacked("y", "odd"),
        "c": Stacked("z", transposed=True),
    }
    key_map = hf_key_map(Weights(keys, {"a": (2, 3), "b": (2, 3), "c": (2, 3, 4)}))
    assert key_map.places["a"] == [
        [KeyPart("x.0", 0), KeyPart("x.1", 1)],
        [KeyPart("y", 0, 0, "even"), KeyPart("y", 1, 1, "even")],
    ]
    assert key_map.keys() == {"x.0", "x.1", "y", "z"}
    [[first, _]] = key_map.places["b"]
    assert first.stored_shape((2, 3)) == [2, 6]
    assert first.view(torch.arange(6)).tolist() == [1, 3, 5]
    [[first, _]] = key_map.places["c"]
    assert first.stored_shape((2, 3, 4)) == [2, 4, 3]


@pytest.mark.parametrize(("half", "rows"), [("first", [0, 1]), ("second", [2, 3]), ("even", [0, 2]), ("odd", [1, 3])])
def test_halves_of_the_rows(half: str, rows: list[int]) -> None:
    stored = torch.arange(20.0).view(4, 5)
    assert torch.equal(KeyPart("x", 0, 0, half).view(stored), stored[rows])  # pyrefly: ignore[bad-argument-type]
    turned = KeyPart("x", 0, 0, half, transposed=True)  # pyrefly: ignore[bad-argument-type]
    assert torch.equal(turned.view(stored.T), stored[rows])
    assert turned.stored_shape((7, 2, 5)) == [7, 5, 4]


def test_rows_as_pairs_and_as_halves(tmp_path: Path) -> None:
    """Two heads of four: rows 0 1 2 3 there are 0 2 1 3 here."""
    model = Weights({"w": "x"}, {"w": (16, 3)})
    model.HF_HALVES = frozenset({"w"})
    rows = torch.arange(16.0)[:, None].expand(16, 3).contiguous()
    save_file({"x": rows}, tmp_path / SINGLE)
    load_hf(model, tmp_path)
    head = [0, 4, 1, 5, 2, 6, 3, 7]
    assert model.state_dict()["w"][:, 0].tolist() == head + [8 + row for row in head]
    save_hf(model, tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / SINGLE)["x"], rows)


def test_blocks_behind_the_last_one(tmp_path: Path) -> None:
    model = Ahead(2, seed=1)
    save_hf(model, tmp_path)
    stored, ours = load_file(tmp_path / SINGLE), model.values()
    assert stored.keys() == {"model.embed.weight"} | {
        f"model.layers.{i}.{key}.weight"
        for i, keys in enumerate([["q"], ["q"], ["q", "head.norm", "embed"], ["q", "head.norm", "embed"]])
        for key in keys
    }
    assert torch.equal(stored["model.layers.3.head.norm.weight"], ours["ahead.3.norm.weight"])
    assert torch.equal(stored["model.layers.2.embed.weight"], ours["embed.weight"])
    read = Ahead(2)
    load_hf(read, tmp_path)
    assert all(torch.equal(value, ours[name]) for name, value in read.state_dict().items())


def test_a_repeated_weight_may_be_absent_but_not_differ(tmp_path: Path) -> None:
    model = Ahead(1, seed=1)
    save_hf(model, tmp_path)
    stored = load_file(tmp_path / SINGLE)
    del stored["model.layers.2.embed.weight"]
    save_file(stored, tmp_path / SINGLE)
    read = Ahead(1)
    load_hf(read, tmp_path)
    assert torch.equal(read.state_dict()["embed.weight"], model.state_dict()["embed.weight"])
    save_file(stored | {"model.layers.2.embed.weight": torch.ones(6, 4)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match="model.layers.2.embed.weight differs from model.embed.weight"):
        load_hf(Ahead(1), tmp_path)


def test_a_copy_of_a_tied_head(tmp_path: Path) -> None:
    """The head has no values of its own, and is repeated behind the last block all the same."""
    model = Ahead(1, seed=1)
    model.HF_KEYS = {**model.HF_KEYS, "head.weight": "lm_head.weight"}
    model.HF_COPIES = {"model.layers.{n_layers+i}.head.weight": "head.weight"}
    model.register_module("head", model.get_submodule("embed"))
    save_hf(model, tmp_path)
    stored = load_file(tmp_path / SINGLE)
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.layers.2.head.weight"], stored["model.embed.weight"])
    load_hf(model, tmp_path)


def test_blocks_that_the_model_lacks_are_passed_over(tmp_path: Path) -> None:
    model = Ahead(2, seed=1)
    save_hf(model, tmp_path)
    stored = load_file(tmp_path / SINGLE) | {"model.layers.1.rotary.inv_freq": torch.ones(2)}
    stored["model.layers.3.q.weight_scale_inv"] = torch.ones(1, 1)
    save_file(stored, tmp_path / SINGLE)
    for n_ahead in (0, 1):
        read = Ahead(n_ahead)
        load_hf(read, tmp_path)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.state_dict().items())


def test_no_key_of_a_block_that_the_model_has_is_passed_over(tmp_path: Path) -> None:
    save_hf(Ahead(1), tmp_path)
    stored = load_file(tmp_path / SINGLE)
    extra = {f"model.layers.{i}.extra.weight": torch.ones(1) for i in (1, 2, 3, 12)}
    save_file(stored | extra, tmp_path / SINGLE)
    with pytest.raises(UserError) as caught:
        load_hf(Ahead(1), tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        f"  {SINGLE}: model.layers.{i}.extra.weight is unknown to Ahead" for i in (1, 2)
    ]


def test_what_hugging_face_does_not_know(tmp_path: Path) -> None:
    """It is neither written nor wanted, and stays as it is; a folder in our format has it, or not."""
    keys: KeyTable = {"w": "x", "bias": None}
    model = Weights(keys, {"w": (2,), "bias": (3,)}, ("bias",))
    before = model.values()
    assert own_key_map(model).optional == {"bias"}
    save_hf(Weights(keys, {"w": (2,), "bias": (3,)}, ("bias",), seed=1), tmp_path)
    assert load_file(tmp_path / SINGLE).keys() == {"x"}
    load_hf(model, tmp_path)
    assert torch.equal(model.state_dict()["bias"], before["bias"])
    assert not torch.equal(model.state_dict()["w"], before["w"])
