"""The weights in a checkpoint, read like those of any other folder."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from core.checkpoint.find import Found, candidates, find_in
from core.checkpoint.index import NAMES, read_tensor
from core.checkpoint.manifest import CONFIG_FILE
from core.config.links import file_in
from core.runtime.ranks import Ranks
from core.weights.shard_file import Header, RowSpan

PREFIX = "model."
"""Of the names of weights in a checkpoint."""


class Saved:
    """The weights of a checkpoint, by the names that they have in their model."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self._stored = {
            name.removeprefix(PREFIX): stored for name, stored in found.tensors().items() if name.startswith(PREFIX)
        }
        self.headers = {
            name: Header(
                Path(str(found), stored.pieces[0].file),
                list(stored.shape),
                NAMES[stored.dtype],
                stored.pieces[0].at if found.storage.is_local and len(stored.pieces) == 1 else 0,
            )
            for name, stored in self._stored.items()
        }
        self.promised: dict[str, str] = {}
        """What a checkpoint's index names was found in it."""

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A weight, or rows of it."""
        return read_tensor(self.found.storage, self.found.folder, self._stored[key], rows)


def newest(folder: str | Path) -> Path | Found:
    """The checkpoint that a folder is, under whatever name, or the newest whole one in the folder of a run; the folder
    itself, if it is neither: weights in a folder of another kind have no manifest that they could be compared with.

    Raises `UserError` when there are checkpoints and none is whole.
    """
    if next(candidates(str(folder)), None) is None:
        return Path(folder)
    return find_in(str(folder), Ranks())


def checkpoints_in(folder: str | Path) -> Iterator[Path]:
    """The folders of the checkpoints in a folder, whole or not, the newest first."""
    return (Path(storage.path(name)) for storage, name in candidates(str(folder)))


def checkpoint_in(folder: str | Path) -> Path:
    """The newest checkpoint in the folder of a run, whole or not; any other folder is itself."""
    return next(checkpoints_in(folder), Path(folder))


def described_in(folder: str | Path) -> Path:
    """The folder whose `config.json` describes the weights in a folder: itself, or the newest checkpoint in it."""
    if file_in(folder, CONFIG_FILE) is None:
        described = (place for place in checkpoints_in(folder) if file_in(place, CONFIG_FILE) is not None)
        return next(described, Path(folder))
    return Path(folder)
