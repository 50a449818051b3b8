"""Which checkpoints are kept, and how others are removed."""

import logging
import math
import re
from collections.abc import Mapping

from core.checkpoint.manifest import MANIFEST
from core.checkpoint.storage import Storage

log = logging.getLogger("armature")

REMOVED = "removed-"
"""Beginning of the name of a folder that is being removed."""
UNFINISHED = re.compile(rf"step-\d+\.tmp|{REMOVED}.*|\.probe-.*")
"""Names of what a process that was killed leaves behind: a save, a removal, a trial of the folder."""


def to_remove(
    steps: Mapping[int, float | None], *, latest: int, every: int, best: int, pinned: frozenset[int]
) -> list[int]:
    """The steps, of those that have a checkpoint with this validation loss, that no rule keeps.

    Kept are the `latest` newest (0 is all), those that `every` divides (0 is none), the `best` with the lowest
    validation loss (the newer of equals; NaN is no loss), those that are `pinned`, and always the newest.
    """
    newest = sorted(steps, reverse=True)
    measured = [(loss, -step) for step, loss in steps.items() if loss is not None and not math.isnan(loss)]
    kept = set(newest[: latest or len(newest)]) | set(newest[:1]) | pinned
    kept |= {step for step in newest if every and step % every == 0}
    kept |= {-step for _, step in sorted(measured)[:best]}
    return sorted(set(steps) - kept)


class Removals:
    """Removes folders from a storage. What cannot be removed is a warning, once for each folder, and stays to be tried
    again."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._warned: set[str] = set()

    def remove(self, folder: str) -> None:
        """Remove a checkpoint so that at no moment a part of it looks like one: on this machine it loses its name
        first, and behind a URI, where a rename moves every file, its manifest."""
        try:
            if self.storage.is_local:
                folder = self._renamed(folder)
            else:
                self.storage.remove(f"{folder}/{MANIFEST}")
            self.storage.remove(folder)
        except OSError as error:
            self._warn(folder, error)

    def remove_unfinished(self) -> None:
        """Remove what killed processes and earlier attempts to remove left behind."""
        for name in self.storage.names():
            if UNFINISHED.fullmatch(name):
                try:
                    self.storage.remove(name)
                except OSError as error:
                    self._warn(name, error)

    def _renamed(self, folder: str) -> str:
        number = 1
        while self.storage.exists(free := f"{REMOVED}{folder}-{number}"):
            number += 1
        self.storage.rename(folder, free, last=MANIFEST)
        return free

    def _warn(self, folder: str, error: OSError) -> None:
        if folder not in self._warned:
            self._warned.add(folder)
            log.warning(
                f"{self.storage}/{folder} cannot be removed: {error.strerror or error}; the next save tries again"
            )
