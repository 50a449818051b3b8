"""The ranks of a run: who started them, how they find each other, and how long they wait for one another."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from core.config.configurable import Configurable
from core.config.errors import UserError


@dataclass(kw_only=True, slots=True)
class Comm(Configurable.Config):
    """Patience with other ranks, and what is remembered of their communication."""

    init_timeout_seconds: int = 300
    """Longest wait for another rank until the first step is done, compilation included."""
    train_timeout_seconds: int = 100
    """Longest wait for another rank afterwards."""
    trace_buf_size: int = 20_000
    """Collectives that NCCL's flight recorder remembers, written out when one times out; 0 turns it off."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("init_timeout_seconds", "train_timeout_seconds"):
            if getattr(self, name) < 1:
                yield name, f"{name} {getattr(self, name)} must be at least 1"
        if self.trace_buf_size < 0:
            yield "trace_buf_size", f"trace_buf_size {self.trace_buf_size} must not be negative"


class World(NamedTuple):
    """This process among those that a launcher started: its number, how many, and the same on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def find_world(environ: Mapping[str, str] = os.environ) -> World | None:
    """What torchrun, or `srun` of SLURM, says of this process; None when neither started it.

    Raises `UserError` when some of torchrun's variables are missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in environ]
        if missing:
            raise UserError(f"{', '.join(missing)} missing beside other variables of torchrun: start with torchrun")
        size = int(environ["WORLD_SIZE"])
        local_size = int(environ.get("LOCAL_WORLD_SIZE", size))
        return World(int(environ["RANK"]), size, int(environ["LOCAL_RANK"]), local_size)
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in environ:
        size, nodes = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_NNODES", "1"))
        return World(int(environ["SLURM_PROCID"]), size, int(environ["SLURM_LOCALID"]), -(-size // nodes))
    return None


def meeting_point(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Address and port where the ranks meet: the launcher's, or under SLURM the first node and a port of the job."""
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    if "SLURM_JOB_ID" not in environ:
        raise UserError("MASTER_ADDR and MASTER_PORT are not set: start with torchrun, or srun under SLURM")
    names = subprocess.run(
        ["scontrol", "show", "hostnames", environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    )
    return names.stdout.split()[0], 20_000 + int(environ["SLURM_JOB_ID"]) % 20_000


@contextmanager
def process_group(world: World | None, device: torch.device, comm: Comm) -> Iterator[None]:
    """The process group of all ranks while the block runs; none for a process that nobody launched.

    Tensors of the host travel by gloo on every device. A restart by torchrun gets a store of its own, because workers
    of the attempt before left their addresses in the old one (torch 2.13).
    """
    if world is None or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", str(int(comm.trace_buf_size > 0)))
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    address, port = meeting_point()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(address, port, world.size, is_master=world.rank == 0 and not hosted, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def leader_first(world: World) -> Iterator[None]:
    """The first rank of each machine goes through the block, then the others: they find what it prepared."""
    if dist.is_initialized() and world.local_rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and world.local_rank == 0:
        dist.barrier()


def lower_timeout(comm: Comm) -> None:
    """From now on wait no longer than the training timeout, in every process group."""
    if not dist.is_initialized():
        return
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    dist.barrier()
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=comm.train_timeout_seconds), group)
