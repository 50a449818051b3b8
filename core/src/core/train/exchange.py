"""What all ranks hear of one another after each step."""

import logging

from core.config.errors import UserError
from core.parallel.layout import Layout
from core.runtime.signals import StopRequest
from core.train.checkpoints import Keeper
from core.train.lock import FolderLock

log = logging.getLogger("armature")


class Exchange:
    """Makes known to all ranks what one of them was asked for, and what keeps one of them from going on."""

    def __init__(self, layout: Layout, keeper: Keeper, lock: FolderLock, requests: StopRequest) -> None:
        self.layout, self.keeper, self.lock, self.requests = layout, keeper, lock, requests
        self.stopping = False
        """Whether a rank was asked to stop."""
        self._saving = False

    def __call__(self) -> bool:
        """Hear of the other ranks, a collective; returns `stopping`, the same on all.

        Raises on all ranks a save that went wrong behind the run, and a folder of the run that is no longer there.
        """
        told, lost = self.requests.told(), self.lock.lost()
        if told:
            log.info(told)
        stops, saves, failures, losses = self.layout.sums(
            float(bool(self.requests)), float(self.requests.take_save()), float(self.keeper.failed), float(bool(lost))
        )
        if losses:
            raise UserError(lost or "the first rank lost the folder of the run")
        self.keeper.check(failures > 0)
        if stops and not self.stopping and not self.requests:
            log.info("a signal to another rank: stopping after this step")
        self.stopping = stops > 0
        self._saving |= saves > 0
        return self.stopping

    def take_save(self) -> bool:
        """Whether a rank was asked to save since the last call, the same on all. (No collective.)"""
        saving, self._saving = self._saving, False
        return saving
