"""Files of a folder that somebody else may have made. A link in it may not lead elsewhere: what it names there would be
read, copied into what one publishes, or overwritten.

A file belongs to a folder when it lies there behind all links. Hugging Face's cache keeps a snapshot as links into the
`blobs` of the same model, `models--a--b/snapshots/<commit>/config.json -> ../../blobs/<hash>`: those belong, too. The
folder itself may be reached through links, for it is what the user named.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from core.config.errors import UserError


def file_in(folder: str | Path, name: str) -> Path | None:
    """The file of this name in a folder; None where there is none.

    Raises `UserError` for a link that leads out of the folder or to nothing, and for what is no regular file.
    """
    path = Path(folder) / name
    try:
        if not os.path.lexists(path):
            return None
        if path.is_symlink() and not belongs(path, folder):
            raise UserError(f"{path} is a link that leads out of its folder, to {os.path.realpath(path)}: not read")
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no regular file")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return path


def belongs(path: Path, folder: str | Path) -> bool:
    """Whether what a path leads to lies in the folder, or in the blobs of the same model of Hugging Face's cache."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    return any(target.is_relative_to(place) for place in [home, *blobs])


def check_targets(folder: Path, names: Iterable[str]) -> None:
    """Raise `UserError` where a file of one of these names, which is written in a folder, is a link, whose target would
    be overwritten, or no regular file."""
    for path in (folder / name for name in names):
        try:
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                kind = f"a link to {os.path.realpath(path)}" if path.is_symlink() else "no regular file"
                raise UserError(f"{path} is {kind}, and a run writes there: remove it, or choose another folder")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
