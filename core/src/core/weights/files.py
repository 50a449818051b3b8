"""The safetensors files of a folder: one, or several with an index. What is in them, single tensors, and new ones."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.config.errors import UserError, at_most
from core.config.json_file import read_json, typed
from core.config.links import file_in
from core.runtime.activity import advance
from core.runtime.units import size_text
from core.weights.shard_file import Header, Output, RowSpan, read_rows, write_shard

log = logging.getLogger("armature")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Folder:
    """The safetensors files of a folder; their headers are read at once, tensors when they are asked for.

    Raises `UserError` for a missing or unreadable file, and for a key that stands in two files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.promised = promised(self.path)
        """The name of the file that has a key, as the index tells."""
        self.headers: dict[str, Header] = {}
        for file in files(self.path, self.promised):
            for key, header in self._headers(file):
                if key in self.headers:
                    raise UserError(f"{key} stands in {self.headers[key].file.name} and in {file.name}")
                self.headers[key] = header

    def rename(self, names: Mapping[str, str]) -> None:
        """Let each of these keys go by another name."""
        self.headers = {names.get(key, key): header for key, header in self.headers.items()}
        self.promised = {names.get(key, key): file for key, file in self.promised.items()}

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A stored tensor, or rows of it; nothing else of it is read."""
        return read_rows(self.headers[key], rows)

    def _headers(self, file: Path) -> Iterator[tuple[str, Header]]:
        """What a file says of its tensors, once the package safetensors has found nothing wrong with it."""
        try:
            with safe_open(file, framework="pt"), open(file, "rb") as stream:
                n_bytes = int.from_bytes(stream.read(8), "little")
                stated = json.loads(stream.read(n_bytes))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        for key, entry in stated.items():
            if key != "__metadata__":
                yield key, Header(file, entry["shape"], entry["dtype"], 8 + n_bytes + entry["data_offsets"][0])


def files(folder: Path, promised: Mapping[str, str]) -> list[Path]:
    """The files that hold the promised keys, or else the single one. Raises `UserError` where one is missing."""
    there = {name: file_in(folder, name) for name in sorted(set(promised.values())) or [SINGLE]}
    if missing := [name for name, file in there.items() if file is None]:
        keys = at_most(1, [key for key, name in promised.items() if name in missing])
        of_them = f", which the index wants for {', '.join(keys)}" if keys else ""
        raise UserError(f"{folder} has no {', '.join(missing)}{of_them}")
    return [file for file in there.values() if file is not None]


def promised(folder: Path) -> dict[str, str]:
    """The name of the file of each key that is read from a folder, as its index tells; none where there is no index.

    A whole file goes before an index that does not name it, as in transformers, and a warning says so.
    """
    names = indexed(folder)
    if names and SINGLE not in names.values() and file_in(folder, SINGLE) is not None:
        log.warning(f"{folder}: {SINGLE} is read, as transformers does, and nothing that the index beside it names")
        return {}
    return names


def stored_keys(folder: Path) -> set[str]:
    """The keys of the weights in a folder; none where there are no weights. Raises `UserError` as `Folder` does."""
    if names := promised(folder):
        return set(names)
    return set(Folder(folder).headers) if file_in(folder, SINGLE) is not None else set()


def indexed(folder: Path) -> dict[str, str]:
    """The name of the file of each key, as the index of a folder tells; none where there is no index."""
    if (index := file_in(folder, INDEX)) is None:
        return {}
    names: dict[str, str] = typed(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    if outside := [name for name in names.values() if Path(name).name != name or name == ".." or "\0" in name]:
        raise UserError(f"{index} names {outside[0]!r}, which is not a file beside it")
    return names


def write_files(
    folder: Path, outputs: list[Output], shard_gib: float, say: Callable[[str], object] | None = None
) -> None:
    """Write the tensors as one safetensors file, or as several with an index: at most `shard_gib` in a file unless one
    tensor alone is more. A stretch of a tensor is in memory at a time; `say` is told each file that is done.

    Raises `UserError` when a file cannot be written."""
    shards = list(split_shards(outputs, shard_gib * 2**30))
    place: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shard)
        advance(f"{i} of {len(shards)} files written")
        place |= {output.key: name for output in shard}
        if say is not None:
            say(f"{name}: {len(shard)} tensors, {size_text(sum(output.n_bytes for output in shard))}")
    if len(shards) > 1:
        n_bytes = sum(output.n_bytes for output in outputs)
        index = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def split_shards(outputs: list[Output], limit: float) -> Iterator[list[Output]]:
    """The tensors in order, cut so that no part exceeds `limit` bytes unless one tensor alone does."""
    shard: list[Output] = []
    size = 0
    for output in outputs:
        if shard and size + output.n_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(output)
        size += output.n_bytes
    yield shard
