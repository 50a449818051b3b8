"""How the ranks of a run find each other: through a store that all of them reach, in a part of it that is theirs."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from core.config.errors import UserError
from core.runtime.launcher import World, meeting_point
from core.runtime.log import warn_everywhere
from core.runtime.span import span

BEAT_S = 60.0
"""So often one who waits tells for whom."""
PAUSES_S = (0.01, 0.5)
"""The first pause between two looks, and the longest."""
CONNECT_S = 10.0
"""Longest wait for an answer to one connection."""
BACKLOG = 4096
"""So many ranks may connect at the same moment."""
LAUNCHER = "the launcher's store"


class Address(NamedTuple):
    """Where the ranks of a run meet."""

    address: str
    port: int
    owner: str
    """Who keeps the store there, in words."""

    @classmethod
    def find(cls) -> "Address":
        """What the launcher says; errors as in `meeting_point`."""
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(*meeting_point(), owner=LAUNCHER if hosted else "rank 0")

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    def call(self, timeout_s: float = CONNECT_S) -> socket.socket:
        """A bare connection. Raises `OSError`."""
        return socket.create_connection((self.address, self.port), timeout_s)


class Patience:
    """A wait that ends, in which it is told now and then who is waited for."""

    def __init__(self, timeout_s: float, rank: int) -> None:
        self.timeout_s, self.rank = timeout_s, rank
        self._began, self._told_s = time.monotonic(), 0.0

    @property
    def left_s(self) -> float:
        return max(self._began + self.timeout_s - time.monotonic(), 0.0)

    def pauses(self, whom: Callable[[], str]) -> Iterator[None]:
        """Pauses until the time is over, each a little longer; `whom` says who is waited for."""
        pause, longest = PAUSES_S
        while True:
            yield
            if self.left_s == 0.0:
                return
            time.sleep(min(pause, self.left_s))
            pause = min(1.5 * pause, longest)
            waited_s = time.monotonic() - self._began
            if waited_s - self._told_s >= BEAT_S:
                self._told_s = waited_s
                warn_everywhere(f"waiting for {whom()} since {waited_s:.0f} s", self.rank)


class Rendezvous:
    """The store of a run as one rank reaches it: a part that no earlier attempt of these ranks, nor another run, uses.

    torchrun keeps one store over all attempts, in which a rank would find addresses of dead ones, and machines count
    attempts differently (torch 2.13). So every rank makes up a name; the first answers each with its own, which names
    the part. What dead ranks asked is answered too, and nobody listens.
    """

    def __init__(self, world: World, place: Address, timeout_s: float) -> None:
        """Rank 0 makes the store, unless the launcher did; the others wait for its answer. Raises `UserError`."""
        self.world, self.place = world, place
        self.is_kept_here = world.rank == 0 and place.owner != LAUNCHER
        self._patience = Patience(timeout_s, world.rank)
        if self.is_kept_here:
            self.place = place._replace(address="localhost")
            self._all = self._make()
        else:
            reach(place, self._patience)
            self._all = self._connect()
        self._part = uuid.uuid4().hex
        if world.rank > 0:
            self._ask()
        self.store: dist.Store = dist.PrefixStore(self._part, self._all)

    def connect(self) -> dist.Store:
        """Another connection to the same part, for another thread."""
        return dist.PrefixStore(self._part, self._connect())

    def admit(self) -> None:
        """On rank 0: tell the others which part is theirs, until all say that they are in it. On the others: say so.

        A rank calls it when it needs no further connection: rank 0 may take its store with it at any time from then on.
        Raises `UserError` when some do not come, or when one cannot be of this run.
        """
        if self.world.rank > 0:
            self._all.compare_set(self._known(self.world.rank), "", "")  # never over a problem
            return
        answered: set[str] = set()
        missing = list(range(1, self.world.size))
        for _ in self._patience.pauses(lambda: f"{span(missing)} to start"):
            for rank in list(missing):
                if (problem := self._read(self._known(rank))) is not None:
                    missing.remove(rank)
                    if problem:
                        raise UserError(problem)
                for name in set((self._read(f"asks {rank}") or "").split()) - answered:
                    self._all.set(f"answer to {name}", f"{self._part} {self.world.size}")
                    answered.add(name)
            if not missing:
                return
        raise UserError(
            f"{span(missing)} of {self.world.size} did not come within {self._patience.timeout_s:g} s "
            "(comm.init_timeout_seconds): what they printed says why"
        )

    def _ask(self) -> None:
        """Take the part that rank 0 names, where it counts as many ranks, and no other process has this number."""
        name, rank, size = uuid.uuid4().hex, self.world.rank, self.world.size
        self._all.append(f"asks {rank}", f"{name} ")  # pyrefly: ignore[missing-attribute] - not in torch's stubs
        pauses = self._patience.pauses(lambda: "rank 0 to answer")
        answer = next(filter(None, (self._read(f"answer to {name}") for _ in pauses)), None)
        if answer is None:
            raise UserError(
                f"rank 0 did not answer within {self._patience.timeout_s:g} s (comm.init_timeout_seconds): what it "
                "printed says why"
            )
        self._part, said = answer.split()
        problem = ""
        if int(said) != size:
            problem = f"WORLD_SIZE is {said} on rank 0 and {size} on rank {rank}: start all ranks with the same"
        elif self._all.add(f"{self._part} has {rank}", 1) > 1:
            problem = f"two processes are rank {rank}: start each rank once"
        if problem:
            self._all.set(self._known(rank), problem)
            raise UserError(problem)

    def _known(self, rank: int) -> str:
        """Where a rank says that it is in this part, or what is wrong."""
        return f"{self._part} is known to {rank}"

    def _read(self, key: str) -> str | None:
        """What stands in the store, or None. (To wait for it there would print warnings.)"""
        return self._all.get(key).decode() if self._all.check([key]) else None

    def _make(self) -> dist.Store:
        return dist.TCPStore(
            self.place.address,
            self.place.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._patience.timeout_s),
            master_listen_fd=listen(self.place.port).detach(),
        )

    def _connect(self) -> dist.Store:
        """A connection to a store, at a place where something listens. Raises `UserError` where that is no store."""
        found: list[dist.Store] = []
        timeout = timedelta(seconds=self._patience.timeout_s)
        address, port, _ = self.place

        def connect() -> None:  # may not come back where something else listens (torch 2.13)
            with suppress(RuntimeError):
                found.append(dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout))

        thread = threading.Thread(target=connect, name="connecting", daemon=True)
        thread.start()
        thread.join(max(self._patience.left_s, CONNECT_S))
        if not found:
            raise UserError(f"what listens at {self.place} is not {self.place.owner}: set MASTER_PORT to a free port")
        return found[0]


def listen(port: int) -> socket.socket:
    """A socket that accepts connections from everywhere. Raises `UserError` where the port is taken or forbidden."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=BACKLOG)
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen on port {port} of {socket.gethostname()} ({os.strerror(error.errno or 0)}): end the "
            "program that uses it, perhaps another run, or set MASTER_PORT to a free port"
        ) from error


def reach(place: Address, patience: Patience) -> None:
    """Wait until something listens at a place; a `UserError` says why nothing was reached."""
    problem = ""
    for _ in patience.pauses(lambda: f"{place.owner} at {place}"):
        try:
            place.call(min(CONNECT_S, patience.left_s + 0.1)).close()
            return
        except (OSError, UnicodeError) as error:  # an empty or overlong name of a machine is a UnicodeError
            problem = str(error)
    raise UserError(
        f"{place.owner} was not reached at {place} within {patience.timeout_s:g} s (comm.init_timeout_seconds; "
        f"{problem}): what it printed says why, or MASTER_ADDR and MASTER_PORT are wrong"
    )
