"""Folders that are filled beside their place and moved there complete; what dead processes left of such is removed.

The lock of a staging folder goes with the process that holds it, whatever ends it. It holds the boot id of the kernel,
written once the lock is held: on one and the same kernel a lock that can be taken has no holder. On other machines a
file system may not show locks, and a file system may have none: there a folder is stale that nobody wrote to for a day.
"""

import fcntl
import glob
import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from core.config.errors import UserError

log = logging.getLogger("armature")


_NAME = re.compile(r".+\.[0-9a-f]{12}")
_LOCK = "lock"
JOURNAL = "journal-of-parts.json"
"""Says how far the work in a folder is: it is continued when the same is asked for again."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STALE_S = 24 * 3600.0
_KEPT_S = 7 * 24 * 3600.0
"""So long work waits to be continued."""


@contextmanager
def staging_folder(place: Path) -> Iterator[Path]:
    """A folder beside `place`, which is to become something there; removed at the end with what is still in it.

    It is new, or what an interrupted process left for the same place, with a journal. With one it stays where the work
    is interrupted, unless by a mistake of the user's.
    """
    remove_stale(place.parent)
    keeps = False
    with ExitStack() as opened:
        folder = _left_for(place, opened)
        if folder is None:
            folder = place.with_name(f"{place.name}.{uuid.uuid4().hex[:12]}")
            folder.mkdir()
            lock = opened.enter_context(open(folder / _LOCK, "w", encoding="utf-8"))
            with suppress(OSError):  # without a lock the folder has its age
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.write(_boot_id())
                lock.flush()
        try:
            yield folder
        except UserError:
            raise
        except BaseException:
            keeps = (folder / JOURNAL).exists()
            raise
        finally:
            if not keeps:
                shutil.rmtree(folder, ignore_errors=True)


def _left_for(place: Path, opened: ExitStack) -> Path | None:
    """The folder with a journal that a dead process left for the same place, which this process has locked."""
    for folder in sorted(place.parent.glob(f"{glob.escape(place.name)}.*")):
        if not _NAME.fullmatch(folder.name) or not (folder / JOURNAL).is_file():
            continue
        with suppress(OSError), ExitStack() as held:
            lock = held.enter_context(open(folder / _LOCK, "r+", encoding="utf-8"))
            if lock.read() == _boot_id() != "":
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (folder / JOURNAL).is_file():  # not removed by who had the lock before
                    opened.push(held.pop_all())
                    return folder
    return None


def remove_stale(parent: Path) -> None:
    """Remove the staging folders in `parent` whose processes are dead."""
    for folder in sorted(parent.iterdir()):
        if not _NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            if _is_stale(folder):
                shutil.rmtree(folder)
                log.info("removed %s, which an interrupted preparation left", folder)
        except FileNotFoundError:
            pass  # removed by its own process, or by another
        except OSError as error:
            log.warning("%s may be left of an interrupted preparation: %s", folder, error)


def _is_stale(folder: Path) -> bool:
    touched = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    untouched = touched < time.time() - _STALE_S
    if (folder / JOURNAL).is_file() and touched > time.time() - _KEPT_S:
        return False
    try:
        lock = open(folder / _LOCK, "r+", encoding="utf-8")
    except FileNotFoundError:
        return untouched
    with lock:
        here = lock.read() == _boot_id() != ""
        if not here and not untouched:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return untouched
        return True


def _boot_id() -> str:
    """Names the running kernel; empty where there is no such name, which is nobody's."""
    try:
        return _BOOT_ID.read_text()
    except OSError:
        return ""
