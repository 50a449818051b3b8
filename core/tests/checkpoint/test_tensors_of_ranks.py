"""Tensors of several ranks in one folder, read by others."""

import json
import uuid

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from core.checkpoint.index import NAMES, StoredTensor, header_problems, read_index, read_tensor
from core.checkpoint.manifest import Written
from core.checkpoint.pieces import load_tensors, save_tensors
from core.checkpoint.storage import Storage
from core.testing.ranks import run_ranks


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {f"of {name}": torch.rand(3, 5, generator=generator).mul(9).to(dtype) for dtype, name in NAMES.items()}
    return found | {
        "count": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "cut": torch.randn(7, 6, generator=generator),
    }


def index_of(storage: Storage) -> dict[str, StoredTensor]:
    """What the index of folder `a` says, where its files are as they should be."""
    files = {name: Written(storage.size(f"a/{name}"), "") for name in storage.names("a")}
    index = read_index(storage, "a", files)
    assert header_problems(storage, "a", index, files) == []
    return index


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_every_type_and_shape_comes_back(tmp_path, kind):
    storage = Storage(tmp_path if kind == "local" else f"memory://{uuid.uuid4().hex}")
    storage.make("a")
    written = tensors()
    files = save_tensors(written, storage, "a", None)
    assert {name: entry.n_bytes for name, entry in files.items()} == {
        name: storage.size(f"a/{name}") for name in storage.names("a")
    }
    read = {name: torch.empty_like(tensor) for name, tensor in written.items()}
    index = index_of(storage)
    load_tensors(read, storage, "a", index, None)
    assert index.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor) and torch.equal(read_tensor(storage, "a", index[name]), tensor)
    assert torch.equal(read_tensor(storage, "a", index["cut"], 4), written["cut"][4])


def test_files_are_safetensors(tmp_path):
    storage = Storage(tmp_path)
    storage.make("a")
    save_tensors(tensors(), storage, "a", None)
    with safe_open(tmp_path / "a/rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("cut@0,0"), tensors()["cut"])
        assert len(list(file.keys())) == len(tensors())


def test_what_does_not_lie_flat_in_memory_is_written_in_order(tmp_path):
    storage = Storage(tmp_path)
    storage.make("a")
    whole = torch.arange(24.0).view(4, 6)
    written = {"turned": whole.mT, "part": whole[1:3, 2:5]}
    save_tensors(written, storage, "a", None)
    index = index_of(storage)
    assert all(torch.equal(read_tensor(storage, "a", index[name]), tensor) for name, tensor in written.items())


def cut(dim: int, n: int, seed: int) -> dict[str, torch.Tensor]:
    """Two tensors that `n` ranks share, of 7 rows, which no number of ranks divides, and one that all have."""
    mesh = init_device_mesh("cpu", (n,))
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(7, 6, generator=generator) for name in ("a", "b")}
    shared = {name: distribute_tensor(tensor, mesh, [Shard(dim)]) for name, tensor in whole.items()}
    return shared | {"count": torch.tensor(float(seed))}


def write(folder: str, dim: int) -> dict:
    return save_tensors(cut(dim, dist.get_world_size(), 5), Storage(folder), "a", dist.group.WORLD)


def read(folder: str, dim: int) -> dict[str, torch.Tensor]:
    mine = cut(dim, dist.get_world_size(), 6)
    load_tensors(mine, Storage(folder), "a", index_of(Storage(folder)), dist.group.WORLD)
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in mine.items()}


def test_other_ranks_read_what_ranks_wrote(tmp_path):
    storage = Storage(tmp_path)
    storage.make("a")
    files, other = run_ranks(write, 2, str(tmp_path), 0)
    assert other == {} and sorted(files) == ["rank-00000.safetensors", "rank-00001.safetensors", "tensors.json"]
    generator = torch.Generator().manual_seed(5)
    expected = {name: torch.randn(7, 6, generator=generator) for name in ("a", "b")} | {"count": torch.tensor(5.0)}
    for found in [*run_ranks(read, 3, str(tmp_path), 1), *run_ranks(read, 1, str(tmp_path), 0)]:
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    index = index_of(storage)
    assert [len(index[name].pieces) for name in ("a", "b", "count")] == [2, 2, 1], "what all ranks have is there once"
    for row in (0, 3, 4, 6):
        assert torch.equal(read_tensor(storage, "a", index["b"], row), expected["b"][row])


def test_the_index_can_be_read_by_people(tmp_path):
    storage = Storage(tmp_path)
    storage.make("a")
    save_tensors({"w": torch.zeros(2, 3)}, storage, "a", None)
    [piece] = json.loads((tmp_path / "a/tensors.json").read_text())["w"].pop("pieces")
    assert piece["file"] == "rank-00000.safetensors" and piece["start"] == [0, 0] and piece["shape"] == [2, 3]
