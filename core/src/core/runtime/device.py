"""The device a run computes on: which, how much memory, how fast."""

import os
import resource
from pathlib import Path

import torch

from core.config.errors import UserError

GIB = 2**30

PEAK_FLOPS = {
    "GB200": 2.5e15,
    "GB300": 2.5e15,
    "B200": 2.25e15,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI355X": 2.5e15,
    "MI325X": 1.3e15,
    "MI300X": 1.3e15,
    "MI250X": 191.5e12,
}
"""Dense bf16 operations per second by the vendors' data sheets, most specific name first."""


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is the machine's accelerator, or the CPU where there is none.

    Of several accelerators rank number `local_rank` of the machine gets that one, unless the name has a number.
    """
    device = _named_device(name)
    if device.type == "cpu" or device.index is not None:
        return device
    if local_rank >= (n := torch.accelerator.device_count()):
        raise UserError(f"rank {local_rank} of this machine has no {device.type} device of its own, there are {n}")
    return torch.device(device.type, local_rank)


def _named_device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'"{name}" is not a device: use auto, cpu or cuda') from error
    if device.type != "cpu":
        if accelerator is None or accelerator.type != device.type:
            found = accelerator or "no accelerator that this PyTorch can use"
            raise UserError(f'device "{name}" asked for, this machine has {found}: use auto or cpu')
        if (device.index or 0) >= (n := torch.accelerator.device_count()):
            raise UserError(f'device "{name}" asked for, the last of {n} here is {device.type}:{n - 1}')
    return device


def describe(device: torch.device) -> str:
    """One line for people: the accelerator's name, or the CPU and its threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be allocated now; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [_available_memory(), _container_memory()]
    return min((value for value in known if value is not None), default=None)


def _available_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _container_memory() -> int | None:
    """What a control group (version 2) leaves to its processes; cached files that nobody uses make way."""
    limit, used, parts = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current", "stat"))
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return None
    cached = dict(line.split() for line in parts.read_text().splitlines()).get("inactive_file", "0")
    return int(text) - int(used.read_text()) + int(cached)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: the allocator's on an accelerator, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of the device; None where nobody has stated them."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
