"""How ranks find each other, and what is said where they do not. Ranks are threads here."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from core.config.errors import UserError
from core.runtime import rendezvous
from core.runtime.launcher import World
from core.runtime.rendezvous import LAUNCHER, Address, Rendezvous, listen


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    """What a launcher keeps."""
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def place_of(store: dist.TCPStore) -> Address:
    return Address("127.0.0.1", store.port, LAUNCHER)


def meet(place: Address, world: World, pause_s: float = 0.0, timeout_s: float = 30.0) -> dist.Store | str:
    """The store that a rank finds, or what it is told."""
    time.sleep(pause_s)
    try:
        found = Rendezvous(world, place, timeout_s)
        found.admit()
        return found.store
    except UserError as error:
        return str(error)


def attempt(place: Address, worlds: list[World], **more: float) -> list[dist.Store | str]:
    """What all ranks find, the first coming a little later than the others."""
    with ThreadPoolExecutor(len(worlds)) as pool:
        futures = [pool.submit(meet, place, world, 0.1 * (world.rank == 0), **more) for world in worlds]
        return [future.result() for future in futures]


def test_every_attempt_finds_a_part_of_the_launchers_store_that_is_empty(store):
    store.append("asks 1", "a rank that is dead ")
    for number in range(3):
        parts = attempt(place_of(store), [World(rank, 3) for rank in range(3)])
        assert not parts[0].check(["address"])
        parts[0].set("address", f"of attempt {number}")
        assert [part.get("address") for part in parts] == [f"of attempt {number}".encode()] * 3


def test_rank_0_makes_the_store_where_no_launcher_does():
    with listen(0) as free:
        port = free.getsockname()[1]
    parts = attempt(Address("127.0.0.1", port, "rank 0"), [World(rank, 3) for rank in range(3)])
    parts[2].set("greeting", "of rank 2")
    assert parts[0].get("greeting") == b"of rank 2"


def test_rank_0_waits_until_no_rank_needs_a_further_connection(store):
    """It keeps the store, and may end at any moment after that."""
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(meet, place_of(store), World(0, 2), timeout_s=1.0)
        found = Rendezvous(World(1, 2), place_of(store), 30)
        assert told.result().startswith("rank 1 of 2 did not come within 1 s")
        again = pool.submit(meet, place_of(store), World(0, 2))
        found = Rendezvous(World(1, 2), place_of(store), 30)
        found.admit()
        again.result().set("greeting", "of rank 0")
    assert found.store.get("greeting") == b"of rank 0"


def test_ranks_that_do_not_come_are_named(store, caplog, monkeypatch):
    monkeypatch.setattr(rendezvous, "BEAT_S", 0.1)
    monkeypatch.setattr(logging.getLogger("armature"), "propagate", True)
    first, _ = attempt(place_of(store), [World(0, 4), World(2, 4)], timeout_s=0.5)
    assert first == (
        "ranks 1, 3 of 4 did not come within 0.5 s (comm.init_timeout_seconds): what they printed says why"
    )
    assert "waiting for ranks 1, 3 to start since 0 s" in caplog.messages
    (second,) = attempt(place_of(store), [World(1, 2)], timeout_s=0.3)
    assert second.startswith("rank 0 did not answer within 0.3 s (comm.init_timeout_seconds)")


def test_ranks_that_count_differently_are_told(store):
    told = attempt(place_of(store), [World(0, 2), World(1, 3)], timeout_s=20)
    assert told == ["WORLD_SIZE is 2 on rank 0 and 3 on rank 1: start all ranks with the same"] * 2


def test_a_rank_that_is_started_twice_is_told(store):
    worlds = [World(0, 3), World(1, 3), World(2, 3), World(1, 3)]
    told = [found for found in attempt(place_of(store), worlds, timeout_s=20) if isinstance(found, str)]
    assert told and set(told) == {"two processes are rank 1: start each rank once"}


def test_a_port_that_is_taken_is_one_line():
    with listen(0) as taken:
        port = taken.getsockname()[1]
        told = meet(Address("127.0.0.1", port, "rank 0"), World(0, 2))
    assert told.startswith(
        f"rank 0 cannot listen on port {port} of {socket.gethostname()} (Address already in use): end"
    )
    assert "\n" not in told


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-machine.invalid", "a..b", "x" * 80])
def test_a_place_that_cannot_be_reached_is_one_line(address):
    with listen(0) as free:
        port = free.getsockname()[1]
    told = meet(Address(address, port, "rank 0"), World(1, 2), timeout_s=0.2)
    assert told.startswith(f"rank 0 was not reached at {address}:{port} within 0.2 s (comm.init_timeout_seconds; ")
    assert "\n" not in told and told.endswith("MASTER_ADDR and MASTER_PORT are wrong")


def test_something_else_that_listens_there_is_no_rank(monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.3)
    with listen(0) as mute:
        place = Address("127.0.0.1", mute.getsockname()[1], "rank 0")
        told = meet(place, World(1, 2), timeout_s=0.3)
    for thread in threading.enumerate():
        if thread.name == "connecting":
            thread.join()
    assert told == f"what listens at {place} is not rank 0: set MASTER_PORT to a free port"
