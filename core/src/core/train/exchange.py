"""What all ranks hear of one another after each step."""

import logging

from core.config.errors import UserError
from core.parallel.layout import RankView
from core.runtime.signals import StopRequest
from core.train.checkpoints import RunCheckpoints
from core.train.lock import FolderLock
from core.train.observers import Observers

log = logging.getLogger("armature")


class Exchange:
    """Makes known to all ranks what one of them was asked for, and what keeps one of them from going on."""

    def __init__(
        self,
        layout: RankView,
        checkpoints: RunCheckpoints,
        lock: FolderLock,
        requests: StopRequest,
        observers: Observers,
    ) -> None:
        self.layout, self.checkpoints, self.lock, self.requests, self.observers = (
            layout,
            checkpoints,
            lock,
            requests,
            observers,
        )
        self.stopping = False
        """Whether a rank was asked to stop, or an observer on one asked."""
        self.cause = ""
        """Who asked, as far as this rank knows."""
        self._saving = False

    def __call__(self) -> bool:
        """Hear of the other ranks, a collective; returns `stopping`, the same on all.

        Raises on all ranks a save that went wrong behind the run, and a folder of the run that is no longer there.
        """
        told, lost = self.requests.told(), self.lock.lost()
        if told:
            log.info(told)
        own = (self.requests, self.requests.take_save(), self.checkpoints.failed, lost, self.observers.cause)
        signals, saves, failures, losses, asked = self.layout.sums(*(float(bool(each)) for each in own))
        if losses:
            raise UserError(lost or "the first rank lost the folder of the run")
        self.checkpoints.check(failures > 0)
        if (signals or asked) and not self.stopping:
            self.cause = self._cause(signals > 0)
        self.stopping = signals + asked > 0
        self._saving |= saves > 0
        return self.stopping

    def _cause(self, signals: bool) -> str:
        own = self.requests.signal.name if self.requests.signal else self.observers.cause
        other = "a signal to another rank" if signals else "an observer on another rank"
        if not own:
            log.info(f"{other}: stopping after this step")
        return own or other

    def take_save(self) -> bool:
        """Whether a rank was asked to save since the last call, the same on all. (No collective.)"""
        saving, self._saving = self._saving, False
        return saving
