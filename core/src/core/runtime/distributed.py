"""The ranks of a run: how they find each other, and how long they wait for one another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from core.config.configurable import Configurable, range_problems
from core.runtime.launcher import World
from core.runtime.ranks import PATIENT
from core.runtime.rendezvous import Address, Rendezvous
from core.runtime.watch import watched

YEAR_S = 365 * 24 * 3600
ENDLESS = timedelta(seconds=YEAR_S)
"""Time-out of work that is watched: gloo has none that means for ever."""


@dataclass(kw_only=True, slots=True)
class Comm(Configurable.Config):
    """Patience with other ranks, and what is remembered of their communication."""

    init_timeout_seconds: int = 300
    """Longest wait for another rank to start, and then in a step, until the first is done, compilation included."""
    train_timeout_seconds: int = 100
    """Longest wait for another rank in a later step; what a pipeline sends through gloo keeps the first one."""
    save_timeout_seconds: int = 1800
    """How long a rank that others wait for may make no progress in work beside the steps, which may take hours: text
    that is prepared, checkpoints that are verified, loaded and saved."""
    trace_buf_size: int = 20_000
    """Collectives that NCCL's flight recorder remembers; when one times out, each rank writes them to
    comm_traces/rank_<number> in the run's folder. 0 turns it off."""

    def problems(self) -> Iterator[tuple[str, str]]:
        timeouts = ("init_timeout_seconds", "train_timeout_seconds", "save_timeout_seconds")
        yield from range_problems(self, **dict.fromkeys(timeouts, YEAR_S))
        yield from range_problems(self, low=0, trace_buf_size=2**24)


@contextmanager
def process_group(world: World | None, device: torch.device, comm: Comm) -> Iterator[timedelta]:
    """The process group of all ranks while the block runs; none for a process that nobody launched, nor where the
    caller has made one. Yields how long work beside the steps may take: without end where the ranks are watched.

    Tensors of the host travel by gloo on every device. Raises `LostRank` where another rank ended the run. An error
    leaves the group to the end of the process, for taking leave of ranks that no longer answer may take long.
    """
    if world is None or dist.is_initialized():
        yield timedelta(seconds=comm.save_timeout_seconds)
        return
    if device.type == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", str(int(comm.trace_buf_size > 0)))
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    rendezvous = Rendezvous(world, Address.find(), comm.init_timeout_seconds)
    with watched(rendezvous, world, comm.save_timeout_seconds):
        dist.init_process_group(
            backends(device),
            store=rendezvous.store,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=comm.init_timeout_seconds),
        )
        yield ENDLESS
    dist.destroy_process_group()


def backends(device: torch.device) -> str:
    """What carries the messages of the host and of `device`, as `init_process_group` has it."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def keep_traces_in(folder: Path) -> None:
    """Have NCCL's flight recorder, where it is on, write to comm_traces in the run's `folder`; `torchfrtrace` reads it.

    PyTorch looks for the place when it writes, for the rest when the group is made. The environment goes before.
    """
    if os.environ.get("TORCH_NCCL_DUMP_ON_TIMEOUT") == "1":
        traces = folder.absolute() / "comm_traces"
        traces.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{traces}/rank_")


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
