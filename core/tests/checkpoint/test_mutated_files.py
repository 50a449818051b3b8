"""Files of checkpoints and weights, of ours and of others, that went wrong: each is read for what it says, or refused.

None ends in another error, and no tensor of a checkpoint has values that were not written.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch

from core.checkpoint.find import find_in
from core.checkpoint.index import read_tensor
from core.checkpoint.manifest import Progress, manifest_digest
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage
from core.config.errors import UserError
from core.config.record import to_json
from core.parallel.schedule_file import read_schedule
from core.runtime.ranks import Ranks
from core.testing.mutations import mutated_bytes, mutated_json
from core.testing.toy import Toy, on_cpu, randomise
from core.train.folder import check_run_folder, make_run_folder
from core.train.lock import FolderLock
from core.weights.folder import load_folder, load_weights, save_weights
from core.weights.hf import save_hf

N_QUICK, N_LONG = 40, 2000
SHARD_GIB = 9000 / 2**30
Read = Callable[[Path], object]


@cache
def toy() -> Toy:
    """The model that was written."""
    model = on_cpu(Toy.Config())
    randomise(model, 1)
    return model


@cache
def other() -> Toy:
    """One of the same sizes that weights are read into."""
    return on_cpu(Toy.Config())


def make_checkpoint(folder: Path) -> None:
    """`folder`/step-3, of the toy model."""
    model = toy()
    settings = Checkpoint(enable=True, folder=str(folder))
    config = to_json(model.config)
    saver = Saver(settings, Ranks(), run_folder=folder, config=config, export=lambda found, path: None)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    saver.save(Progress(step=3, places=[{"position": 1}]), weights, kind="full", wait=True)


def make_run(folder: Path) -> None:
    """`folder` of a run that torchrun started."""
    make_run_folder(str(folder), "toy", LAUNCHED)
    with FolderLock(folder, Checkpoint()):
        pass


LAUNCHED = {"TORCHELASTIC_RUN_ID": "7"}
SCHEDULE = "0F0,0F1,,0B0,(0F2;0B1)OVERLAP_F_B,,0B2\n,1F0,1B0,1F1,1I1,1W1,1F2,1B2\n"
MAKERS: dict[str, Callable[[Path], object]] = {
    "step-3": lambda folder: make_checkpoint(folder.parent),
    "theirs": lambda folder: save_hf(toy(), folder, shard_gib=SHARD_GIB),
    "ours": lambda folder: save_weights(toy(), folder, shard_gib=SHARD_GIB),
    "run": make_run,
    "schedule": lambda folder: folder.mkdir() or (folder / "two.csv").write_text(SCHEDULE),
}
"""The folders, by name, and what makes them."""


def vouch(checkpoint: Path) -> None:
    """Have the manifest say of all files what they are now, and of itself that nobody changed it."""
    try:
        said = json.loads((checkpoint / "manifest.json").read_bytes())
        for name in said["files"]:
            data = (checkpoint / name).read_bytes()
            said["files"][name] = {"n_bytes": len(data), "crc32": Storage(checkpoint).sums(name)}
        said.pop("digest", None)
        text = json.dumps({**said, "digest": manifest_digest(said)})
    except Exception:  # it is no manifest any more: nothing can vouch
        return
    (checkpoint / "manifest.json").write_text(text)


def sign(checkpoint: Path) -> None:
    """Have the manifest say of itself alone that nobody changed it."""
    try:
        said = json.loads((checkpoint / "manifest.json").read_bytes())
        said.pop("digest", None)
        text = json.dumps({**said, "digest": manifest_digest(said)})
    except Exception:
        return
    (checkpoint / "manifest.json").write_text(text)


def read_checkpoint(folder: Path) -> None:
    """What is read of it has the values that were written, in the right place."""
    found = find_in(str(folder), Ranks())
    found.config()
    written = toy().state_dict()
    for name, stored in found.tensors().items():
        expected = written[name.removeprefix("model.")]
        read = read_tensor(found.storage, found.folder, stored)
        assert read.dtype == expected.dtype and torch.equal(read, expected), name


def read_run(folder: Path) -> None:
    check_run_folder(str(folder), Checkpoint(), LAUNCHED)
    with FolderLock(folder, Checkpoint()), pytest.raises(UserError, match="is in use by"):
        FolderLock(folder, Checkpoint()).__enter__()


READERS: dict[str, tuple[str, Callable[[bytes, Random], bytes], Read]] = {
    "step-3/manifest.json": ("signed", mutated_json, read_checkpoint),
    "step-3/tensors.json": ("vouched", mutated_json, read_checkpoint),
    "step-3/config.json": ("vouched", mutated_json, lambda folder: load_folder(other(), folder)),
    "step-3/rank-00000.safetensors": ("", mutated_bytes, read_checkpoint),
    "theirs/config.json": ("", mutated_json, lambda folder: load_folder(other(), folder)),
    "theirs/model.safetensors.index.json": ("", mutated_json, lambda folder: load_folder(other(), folder)),
    "theirs/model-00002-of-00004.safetensors": ("header", mutated_json, lambda folder: load_folder(other(), folder)),
    "ours/config.json": ("", mutated_json, lambda folder: load_weights(other(), folder)),
    "ours/model-00002-of-00004.safetensors": ("", mutated_bytes, lambda folder: load_weights(other(), folder)),
    "run/torchrun-id": ("", mutated_bytes, read_run),
    "run/.lock": ("", mutated_bytes, read_run),
    "schedule/two.csv": ("", mutated_bytes, lambda folder: read_schedule(str(folder / "two.csv"))),
}
"""Files, how each is changed, and what reads it."""


def mutated(data: bytes, how: str, mutate: Callable[[bytes, Random], bytes], draw: Random) -> bytes:
    """The bytes of a changed file; `header` changes that of a safetensors file alone."""
    if how != "header":
        return mutate(data, draw)
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate(data[8:end], draw)
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_mutated(file: Path, n: int) -> int:
    """Change a file again and again; returns how often it was refused."""
    how, mutate, read = READERS[f"{file.parent.name}/{file.name}"]
    folder = file.parent
    whole = {each: each.read_bytes() for each in folder.iterdir()}
    draw = Random(file.name)
    n_refused = 0
    for number in range(n):
        file.write_bytes(mutated(whole[file], how, mutate, draw))
        if how == "vouched":
            vouch(folder)
        elif how == "signed" and draw.random() < 0.8:
            sign(folder)
        try:
            read(folder)
        except UserError:
            n_refused += 1
        except Exception as error:
            error.add_note(f"{file.name}, change {number}: {file.read_bytes()[:2000]!r}")
            raise
        for each, data in whole.items():
            each.write_bytes(data)
    return n_refused


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The file that is to be changed, in its folder."""
    folder, _, name = request.param.partition("/")
    MAKERS[folder](tmp_path / folder)
    READERS[request.param][2](tmp_path / folder)  # as it is it can be read
    return tmp_path / folder / name


@pytest.mark.parametrize("file", READERS, indirect=True)
def test_a_file_that_went_wrong_is_read_or_refused(file: Path) -> None:
    print(f"{read_mutated(file, N_QUICK)} of {N_QUICK} refused")


@pytest.mark.faults
@pytest.mark.parametrize("file", READERS, indirect=True)
def test_many_files_that_went_wrong_are_read_or_refused(file: Path) -> None:
    print(f"{read_mutated(file, N_LONG)} of {N_LONG} refused")
