"""What torchrun, or `srun` of SLURM, says of this process: which rank it is, and where the ranks meet."""

import os
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from core.config.errors import UserError

PORTS = range(12_000, 32_000)
"""Where the ranks of a SLURM step meet: below the ports that Linux hands out by itself."""
MOST_VARIABLE_DIGITS = 10
"""So many digits may a launcher's number have; SLURM counts steps up to 4294967295."""
SCONTROL_S = 60
"""So long is scontrol waited for."""


class World(NamedTuple):
    """This process among those that a launcher started: its number, how many, and the same on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def find_world(environ: Mapping[str, str] = os.environ) -> World | None:
    """What torchrun, or `srun` of SLURM, says of this process; None when neither started it.

    A shell inside a SLURM job has variables of the job, and is a step of one task at most: what it starts is alone.
    Raises `UserError` when some of a launcher's variables are missing or make no sense.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank, size, local = _ranks(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        n_local = _number(environ, "LOCAL_WORLD_SIZE", "a number of ranks") if "LOCAL_WORLD_SIZE" in environ else size
        if not local < n_local <= size:
            raise UserError(
                f"LOCAL_WORLD_SIZE={n_local}, LOCAL_RANK={local}, WORLD_SIZE={size}: the ranks of this machine must be "
                "more than LOCAL_RANK, and at most WORLD_SIZE"
            )
        return World(rank, size, local, n_local)
    if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    rank, size, local = _ranks(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    n_nodes = _number(environ, "SLURM_STEP_NUM_NODES", "a number of machines", 1)
    if not 1 <= n_nodes <= size:
        raise UserError(f"SLURM_STEP_NUM_NODES={n_nodes}: {size} tasks run on 1 to {size} machines; start with srun")
    return World(rank, size, local, -(-size // n_nodes))


def _ranks(environ: Mapping[str, str], *names: str) -> list[int]:
    """A rank's number, the number of ranks, and its number on its machine."""
    if missing := [name for name in names if name not in environ]:
        others = ", ".join(name for name in names if name in environ)
        raise UserError(f"{others} set without {', '.join(missing)}: start with torchrun or srun, or unset {others}")
    words = ", ".join(f"{name}={environ[name]}" for name in names)
    if not all(_is_number(environ[name]) for name in names):
        raise UserError(f"{words}: not numbers of ranks; start with torchrun or srun")
    rank, size, local = numbers = [int(environ[name]) for name in names]
    if not local <= rank < size:
        raise UserError(f"{words}: ranks count from 0, and no rank's number on its machine is above its number of all")
    return numbers


def _number(environ: Mapping[str, str], name: str, kind: str, default: int | None = None) -> int:
    """The whole number that a variable holds, which is to be of this kind; the default where it is not set."""
    if default is not None and name not in environ:
        return default
    if not _is_number(environ[name]):
        raise UserError(f"{name}={environ[name]} is not {kind}: unset it, or start with torchrun or srun")
    return int(environ[name])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MOST_VARIABLE_DIGITS


def meeting_point(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Address and port where the ranks meet: the launcher's, or under SLURM the first node and a port of the step."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing and "SLURM_JOB_ID" not in environ:
        raise UserError(f"{' and '.join(missing)} not set: start with torchrun, or with srun inside a SLURM job")
    address = environ.get("MASTER_ADDR") or _first_node(environ)
    if "MASTER_PORT" not in environ:
        job, step = (_number(environ, name, "a number of SLURM", 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        return address, PORTS[(31 * job + step) % len(PORTS)]
    port = environ["MASTER_PORT"]
    if not (_is_number(port) and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port} is no port: use a free one from 1024 to 65535")
    return address, int(port)


def _first_node(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if "SLURM_JOB_ID" not in environ:
        raise UserError("MASTER_ADDR is empty: set it to the name of the machine that rank 0 runs on")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=environ, timeout=SCONTROL_S)
        return told.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(f'scontrol cannot tell the first node of "{nodes}": set MASTER_ADDR to its name') from error


def launch_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """What all attempts of one torchrun have in common and no other has; None where there is nothing like that."""
    name = environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name
