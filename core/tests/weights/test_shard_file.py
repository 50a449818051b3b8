"""One safetensors file, written and read a stretch at a time: the file that the package safetensors writes."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint.index import TYPES
from core.config.errors import UserError
from core.weights import shard_file
from core.weights.files import Folder
from core.weights.shard_file import FileSpan, Output, read_rows, stretches, write_shard


def drawn() -> dict[str, Tensor]:
    """Tensors of every type and of several shapes, also empty and without axes."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, (name, dtype) in enumerate(TYPES.items()):
        for shape in ((), (0, 3), (5,), (7, 3), (4, 2, 3)):
            values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
            found[f"{name}.é{'x' * number}.{len(shape)}.{0 in shape}"] = values
    return found


def parts(values: Tensor) -> Iterator[Tensor]:
    if values.dim() == 0:
        yield values
    else:
        yield from (values[rows] for rows in stretches(values.shape, values.dtype))


def outputs(tensors: dict[str, Tensor]) -> list[Output]:
    return [Output(key, list(t.shape), t.dtype, partial(parts, t)) for key, t in tensors.items()]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "STRETCH_BYTES", 24)
    monkeypatch.setattr(shard_file, "FLUSH_BYTES", 100)


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = drawn()
    write_shard(tmp_path / "ours", outputs(tensors))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_are_read_alone(tmp_path: Path) -> None:
    tensors = drawn()
    save_file(tensors, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    for key, values in tensors.items():
        assert torch.equal(folder.read(key), values)
        for row in range(len(values) if values.dim() else 0):
            assert torch.equal(folder.read(key, row), values[row])
            assert torch.equal(folder.read(key, slice(row, len(values))), values[row:])


def test_a_stretch_is_one_row_at_least() -> None:
    assert list(stretches([3, 100], torch.float32)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(stretches([5, 3], torch.bfloat16)) == [slice(0, 4), slice(4, 5)]
    assert list(stretches([0, 3], torch.float32)) == []


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the writing thread meets ends the writing, and is told."""
    tensors = {"a": torch.ones(400, 3)}

    def write(self: shard_file.BackgroundWriter, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_file.BackgroundWriter, "_write", write)
    with pytest.raises(UserError, match=r"cannot write .*model: No space left on device"):
        write_shard(tmp_path / "model", outputs(tensors))


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "model.safetensors")
    header = Folder(tmp_path).headers["a"]
    header.file.write_bytes(header.file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: 4 bytes are missing at its end"):
        read_rows(header)


def spans(tensors: dict[str, Tensor], folder: Path) -> list[Output]:
    """The tensors as bytes of the file in a folder."""
    headers = Folder(folder).headers
    where = {key: FileSpan(headers[key].file, headers[key].at, values.nbytes) for key, values in tensors.items()}
    return [Output(key, list(t.shape), t.dtype, partial(iter, [where[key]])) for key, t in tensors.items()]


def test_bytes_of_another_file_are_copied(tmp_path: Path) -> None:
    """Between stretches that are written from memory, and longer than one."""
    tensors = drawn()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    copied, made = spans(tensors, tmp_path), outputs(tensors)
    write_shard(tmp_path / "copied", [(copied if number % 3 else made)[number] for number in range(len(made))])
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_disk_that_is_full_while_bytes_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.ones(400, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    sendfile, calls = os.sendfile, []

    def fail(out: int, *where: int) -> int:
        calls.append(where)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return sendfile(out, *where)

    monkeypatch.setattr(os, "sendfile", fail)
    with pytest.raises(UserError, match=r"cannot write .*copied: No space left on device"):
        write_shard(tmp_path / "copied", spans(tensors, tmp_path))


def test_a_copied_file_that_became_shorter_or_is_gone(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(9)}
    save_file(tensors, file := tmp_path / "model.safetensors")
    made = spans(tensors, tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: 4 bytes are missing at its end"):
        write_shard(tmp_path / "copied", made)
    file.unlink()
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: No such file"):
        write_shard(tmp_path / "again", made)
