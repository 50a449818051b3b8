"""A checkpoint is compared with its manifest, whatever its folder is called and whoever reads it."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.find import find_in
from core.checkpoint.manifest import Progress
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.record import to_json
from core.runtime.ranks import Ranks
from core.testing.toy import Toy, on_cpu, randomise
from core.weights.convert import main as convert
from core.weights.folder import load_folder, load_weights

FAMILIES: dict[str, Any] = {"toy": Toy}


def toy(seed: int) -> Toy:
    model = on_cpu(Toy.Config())
    randomise(model, seed)
    return model


@pytest.fixture
def step_3(tmp_path: Path) -> Path:
    """The checkpoint of step 3 of a run."""
    model = toy(1)
    (tmp_path / "run").mkdir()
    settings = Checkpoint(enable=True, folder=str(tmp_path / "run"))
    config = to_json(model.config)
    saver = Saver(settings, Ranks(), run_folder=tmp_path, config=config, export=lambda found, path: None)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    saver.save(Progress(step=3), weights, kind="full", wait=True)
    return tmp_path / "run/step-3"


def renamed(checkpoint: Path) -> Path:
    return checkpoint.rename(checkpoint.with_name("best"))


def copied(checkpoint: Path) -> Path:
    return Path(shutil.copytree(checkpoint, checkpoint.parents[1] / "copies/final"))


def linked(checkpoint: Path) -> Path:
    checkpoint.with_name("latest").symlink_to(checkpoint.name)
    return checkpoint.with_name("latest")


def unfinished(checkpoint: Path) -> Path:
    """As it is when a process is killed before it gives a whole checkpoint its name."""
    return checkpoint.rename(checkpoint.with_name("step-3.tmp"))


def entered(checkpoint: Path) -> Path:
    os.chdir(checkpoint)
    return Path(".")


PLACES = pytest.mark.parametrize("place", [renamed, copied, linked, unfinished, entered])
Reader = Callable[[Path, Path], object]


def read_to_export(folder: Path, scratch: Path) -> None:
    convert(FAMILIES, ["to-hf", str(folder), str(scratch / "exported")])


READERS: dict[str, Reader] = {
    "load": lambda folder, _: load_folder(toy(2), folder),
    "load_weights": lambda folder, _: load_weights(toy(2), folder),
    "begin": lambda folder, _: find_in(str(folder), Ranks()),
}


@PLACES
def test_a_whole_one_is_read_under_any_name(step_3: Path, place: Callable[[Path], Path], monkeypatch) -> None:
    monkeypatch.chdir(step_3.parent)
    folder = place(step_3)
    model = toy(2)
    load_folder(model, folder)
    for name, weight in toy(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    read_to_export(folder, step_3.parents[1])


@PLACES
def test_a_flipped_bit_is_found_under_any_name(
    step_3: Path, tmp_path: Path, place: Callable[[Path], Path], monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(step_3.parent)
    folder = place(step_3)
    draw = random.Random(place.__name__)
    model, before = toy(2), toy(2).state_dict()
    for _ in range(8):
        file = draw.choice(sorted(folder.iterdir()))
        whole = file.read_bytes()
        data = bytearray(whole)
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        for read in READERS.values():
            with pytest.raises(UserError, match=f"is damaged: .*{file.name}"):
                read(folder, tmp_path)
        load_refused(model, folder)
        with pytest.raises(SystemExit):
            read_to_export(folder, tmp_path)
        assert "is damaged: " in capsys.readouterr().err and not (tmp_path / "exported").exists()
        file.write_bytes(whole)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def load_refused(model: Toy, folder: Path) -> None:
    with pytest.raises(UserError):
        load_folder(model, folder)


@pytest.mark.parametrize("how", [shutil.copytree, os.rename, lambda old, new: new.symlink_to(old)])
def test_a_name_that_says_another_step_is_refused(step_3: Path, tmp_path: Path, how: Callable) -> None:
    """A run that went on from it, or counted on its being older, would be wrong."""
    other = step_3.with_name("step-9")
    how(step_3, other)
    words = "step-9 is damaged: it is the checkpoint of step 3 under another's name"
    for read in READERS.values():
        with pytest.raises(UserError, match=words):
            read(other, tmp_path)


@pytest.mark.parametrize("gone", ["manifest.json", "config.json", "tensors.json", "rank-00000.safetensors"])
def test_nothing_of_it_is_read_without_the_rest(step_3: Path, tmp_path: Path, gone: str) -> None:
    folder = copied(step_3)
    (folder / gone).unlink()
    for read in (READERS["load"], READERS["load_weights"]):
        with pytest.raises(UserError, match=gone if gone != "tensors.json" else "model.safetensors"):
            read(folder, tmp_path)
