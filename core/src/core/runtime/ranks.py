"""Ranks that act as one: what the first does and all hear of, what each says and all hear."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from core.runtime.activity import waiting

PATIENT = "patient"
"""Description of groups whose ranks may be long in coming."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """All ranks of a run, in a group of their own for work beside training; or a process alone, which has no group."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def patient(cls, timeout: timedelta) -> "Ranks":
        """All ranks, which wait so long for one another: a file may be large. Every rank must call."""
        if not dist.is_initialized():
            return cls()
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc=PATIENT)
        return cls(cast(ProcessGroup, group), dist.get_rank(), dist.get_world_size())

    def first(self, do: Callable[[], T]) -> T:
        """What `do` returns on the first rank, on every rank; an error of it is raised on every rank, too."""
        if self.group is None:
            return do()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = do()
            except Exception as error:
                said[1] = error
        with waiting():
            dist.broadcast_object_list(said, src=0, group=self.group)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def leader_first(self, local_rank: int) -> Iterator[None]:
        """The first rank of each machine goes through the block, then the others: they find what it prepared.

        An error of the first does not keep the others: they find out for themselves.
        """
        if local_rank > 0:
            self._meet()
        try:
            yield
        finally:
            if local_rank == 0:
                self._meet()

    def _meet(self) -> None:
        if self.group is not None:
            with waiting():
                dist.all_reduce(torch.zeros(1), group=self.group)


ALONE = Ranks()
"""A process that nobody launched."""
