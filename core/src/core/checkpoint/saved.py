"""The weights in a checkpoint, read like those of any other folder."""

from pathlib import Path

from torch import Tensor

from core.checkpoint.files import Header
from core.checkpoint.find import candidates, first_whole
from core.checkpoint.index import NAMES, read_index, read_tensor
from core.checkpoint.manifest import TENSORS
from core.checkpoint.storage import Storage
from core.config.errors import UserError
from core.runtime.ranks import Ranks

PREFIX = "model."
"""Of the names of weights in a checkpoint."""


class Saved:
    """The weights of a checkpoint on this machine, by the names that they have in their model."""

    def __init__(self, path: Path) -> None:
        self.path, self._storage = path, Storage(path.parent)
        self._stored = {
            name.removeprefix(PREFIX): stored
            for name, stored in read_index(self._storage, path.name).items()
            if name.startswith(PREFIX)
        }
        self.headers = {
            name: Header(path / stored.pieces[0].file, list(stored.shape), NAMES[stored.dtype])
            for name, stored in self._stored.items()
        }
        self.promised: dict[str, str] = {}
        """What a checkpoint's index names was found in it."""

    def read(self, key: str, row: int | None = None) -> Tensor:
        """A weight, or one row of it."""
        return read_tensor(self._storage, self.path.name, self._stored[key], row)


def newest(folder: str | Path) -> Path:
    """The newest whole checkpoint in the folder of a run, or the folder itself, if that is no run with checkpoints.

    Raises `UserError` when there are some and none is whole.
    """
    there = list(candidates(str(folder)))
    if not there:
        return Path(folder)
    if whole := first_whole(there, Ranks()):
        return Path(str(whole))
    raise UserError(f"{folder} holds no checkpoint that is whole")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return (folder / TENSORS).is_file()
