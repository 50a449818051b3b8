"""The lock on a run's folder: one process at a time, and the folder stays the one that was locked."""

import fcntl
import logging
import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.links import check_targets
from core.runtime.ranks import ALONE, Ranks
from core.train.folder import ANOTHER, LOCK

log = logging.getLogger("armature")


class FolderLock:
    """Keeps other processes out of a run's folder, and out of that of its checkpoints, while the block runs; knows
    whether they are still where they were.

    The first rank has the lock, and every rank must enter the block. Raises `UserError` there when another process has
    it, or when nothing can be written there. The lock goes with the process, whatever ends it. Behind a URI is none.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._folders = {folder.resolve(): (folder.absolute(), ANOTHER)}
        if checkpoint.saves and (place := checkpoint.storage(folder)).is_local:
            root = Path(place.root)
            self._folders.setdefault(root.resolve(), (root, "choose another with --checkpoint.folder"))
        self._held: dict[Path, tuple[int, int]] = {}
        """Folders, their descriptors and those of their locks: while one is open, nothing else can have its inode."""
        self._exits = ExitStack()

    def __enter__(self) -> "FolderLock":
        self._ranks.first(self._acquire)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        self._exits.close()

    def __del__(self) -> None:  # of a run that was built and never ran
        self._exits.close()

    def lost(self) -> str:
        """What became of a folder that is no longer under the name that was locked; nothing where all are, and on
        ranks that have no lock.

        A lock that was removed from its folder is taken again, unless another process has a new one there.
        """
        for folder, (descriptor, file) in list(self._held.items()):
            if not _is_at(folder, descriptor):
                return f"{folder} was {_fate(descriptor)}"
            if not _is_at(folder / LOCK, file):
                log.warning(f"{folder / LOCK} was removed while the run was writing there; it is locked again")
                try:
                    self._lock(folder, "begin again in another", self._exits)
                except UserError as error:
                    return str(error)
        return ""

    def _acquire(self) -> None:
        with self._exits as exits:
            for folder, another in self._folders.values():
                self._lock(folder, another, exits)
            self._exits = exits.pop_all()

    def _lock(self, folder: Path, another: str, exits: ExitStack) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_targets(folder, [LOCK])
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            exits.callback(os.close, file)
            descriptor = os.open(folder, os.O_RDONLY)
            exits.callback(os.close, descriptor)
            self._take(file, folder, another)
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}; {another}") from error
        self._held[folder] = descriptor, file

    def _take(self, file: int, folder: Path, another: str) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            first = os.pread(file, 200, 0).decode(errors="replace").partition("\n")[0].strip()
            raise UserError(
                f"{folder} is in use by {first or 'another process'}: wait until it ends, or {another}"
            ) from error
        except OSError as error:
            log.warning(f"{folder} cannot be locked ({error.strerror}): see that no other run writes there")


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether what is open has this name; also where a network does not say for a while."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _fate(descriptor: int) -> str:
    """What became of an open folder, as far as the system tells, and what to do."""
    place, moved = "", False
    with suppress(OSError):
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        moved = os.path.samestat(os.stat(place), os.fstat(descriptor))
    if moved:
        return f"renamed to {place} while the run was writing there: to go on, give it its name back"
    fate = "removed" if place.endswith(" (deleted)") else "removed or renamed"
    return f"{fate} while the run was writing there: begin again in another"
