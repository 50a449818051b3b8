"""The ranks of a run: how they find each other, and how long they wait for one another."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from core.config.configurable import Configurable, range_problems
from core.runtime.launcher import World, meeting_point
from core.runtime.ranks import PATIENT

LONG = timedelta(days=30)


YEAR_S = 365 * 24 * 3600


@dataclass(kw_only=True, slots=True)
class Comm(Configurable.Config):
    """Patience with other ranks, and what is remembered of their communication."""

    init_timeout_seconds: int = 300
    """Longest wait for another rank until the first step is done, compilation included; text may take longer."""
    train_timeout_seconds: int = 100
    """Longest wait for another rank afterwards; what a pipeline sends through gloo keeps the first one."""
    trace_buf_size: int = 20_000
    """Collectives that NCCL's flight recorder remembers; when one times out, each rank writes them to
    comm_traces/rank_<number> in the run's folder. 0 turns it off."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from range_problems(self, init_timeout_seconds=YEAR_S, train_timeout_seconds=YEAR_S)
        yield from range_problems(self, low=0, trace_buf_size=2**24)


@contextmanager
def process_group(world: World | None, device: torch.device, comm: Comm) -> Iterator[None]:
    """The process group of all ranks while the block runs; none for a process that nobody launched.

    Tensors of the host travel by gloo on every device. An error leaves the group to the end of the process, for
    taking leave of ranks that no longer answer may take long.
    """
    if world is None or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", str(int(comm.trace_buf_size > 0)))
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    address, port = meeting_point()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(address, port, world.size, is_master=world.rank == 0 and not hosted, timeout=timeout)
    dist.init_process_group(
        backends(device),
        store=unused_part(store, world, timeout) if hosted else store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    yield
    dist.destroy_process_group()


def backends(device: torch.device) -> str:
    """What carries the messages of the host and of `device`, as `init_process_group` has it."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def unused_part(store: dist.Store, world: World, timeout: timedelta) -> dist.Store:
    """A part of a launcher's store that no earlier attempt of these ranks has written to.

    torchrun keeps one store over all attempts, in which a rank would find addresses of dead ones, and machines count
    attempts differently (torch 2.13). So every rank makes up a name; the first answers each with its own, which names
    the part, until all have heard it. What dead ranks asked is answered too, and nobody listens.
    """
    name = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"asks {world.rank}", name)
        part = store.get(f"answer to {name}").decode()
        store.add(f"heard of {part}", 1)
        return dist.PrefixStore(part, store)
    answered: set[str] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while (heard := store.add(f"heard of {name}", 0)) < world.size - 1:
        for rank in range(1, world.size):
            if store.check([f"asks {rank}"]) and (asks := store.get(f"asks {rank}").decode()) not in answered:
                store.set(f"answer to {asks}", name)
                answered.add(asks)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{heard + 1} of {world.size} ranks came within {timeout.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def keep_traces_in(folder: Path) -> None:
    """Have NCCL's flight recorder, where it is on, write to comm_traces in the run's `folder`; `torchfrtrace` reads it.

    PyTorch looks for the place when it writes, for the rest when the group is made. The environment goes before.
    """
    if os.environ.get("TORCH_NCCL_DUMP_ON_TIMEOUT") == "1":
        traces = folder.absolute() / "comm_traces"
        traces.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{traces}/rank_")


@contextmanager
def leader_first(world: World) -> Iterator[None]:
    """The first rank of each machine goes through the block, then the others: they find what it prepared.

    They wait as long as it takes. An error of the first does not keep the others: they find out for themselves.
    """
    if world.local_rank > 0:
        _meet()
    try:
        yield
    finally:
        if world.local_rank == 0:
            _meet()


def _meet() -> None:
    if (world := dist.group.WORLD) is not None:
        options = dist.AllreduceOptions()
        options.timeout = LONG
        world.allreduce([torch.zeros(1)], options).wait()


def lower_timeout(comm: Comm) -> None:
    """From now on wait no longer than the training timeout, in every process group but those of patient `Ranks`."""
    if not dist.is_initialized():
        return
    from torch.distributed import distributed_c10d as c10d

    set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # public since torch 2.14
    dist.barrier()
    for group in c10d._world.pg_map:
        if group.group_desc == PATIENT:
            continue
        set_timeout(timedelta(seconds=comm.train_timeout_seconds), group)
