"""The device a run computes on: which, how much memory, how fast."""

import logging
import os
import re
import resource
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.config.errors import UserError

log = logging.getLogger("armature")

MIB, GIB = 2**20, 2**30

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

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables of the environment that hide devices from PyTorch."""


class Accelerator(NamedTuple):
    """What this PyTorch is built for besides the CPU, and how many such devices it can use on this machine now."""

    type: str | None
    """As `torch.device` has it: cuda (NVIDIA's, and AMD's by ROCm), xpu, mps; None for a build for CPUs only."""
    platform: str
    """What the build is for, in words: CUDA 13.0."""
    count: int
    """0 where the build could use one and the machine has none."""
    obstacle: str = ""
    """Why there are none."""
    is_fault: bool = False
    """Whether there may be one that cannot be used, as with an old driver."""


def accelerator() -> Accelerator:
    """The accelerator of this build and this machine: whatever asks for a device asks here.

    `torch.accelerator.current_accelerator()` alone tells of the build, `device_count()` counts devices whose driver is
    too old, and a driver's fault is a warning at the first question only; initialising raises it each time.
    """
    build = torch.accelerator.current_accelerator()
    platform = _platform(build)
    built = f"torch {torch.__version__} is built for {platform}"
    if build is None:
        return Accelerator(None, platform, 0, built)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.accelerator.is_available():
            return Accelerator(build.type, platform, torch.accelerator.device_count())
    module, found = torch.get_device_module(build), "no devices are available"
    if hasattr(module, "init"):  # MPS has none
        try:
            module.init()
        except (AssertionError, RuntimeError) as error:
            found = str(error)
    return Accelerator(build.type, platform, 0, *_obstacle(built, found))


def _platform(build: torch.device | None) -> str:
    if build is None:
        return "CPUs only"
    if build.type != "cuda":
        return build.type.upper()
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def _obstacle(built: str, found: str) -> tuple[str, bool]:
    """Why a build has no device here, from what PyTorch said, and whether that is a fault."""
    if "no NVIDIA driver" in found:
        return f"{built}, and this machine has no NVIDIA driver", False
    hidden = [f'{key}="{os.environ[key]}"' for key in VISIBLE if key in os.environ]
    if re.search(r"no .* are available", found, re.IGNORECASE) or any(line.endswith('=""') for line in hidden):
        return f"{built}, and sees no such device here{' with ' * bool(hidden)}{', '.join(hidden)}", False
    if version := re.search(r"too old \(found version (\d+)\)", found):
        major, minor = divmod(int(version[1]) // 10, 100)
        return (
            f"{built}, and the NVIDIA driver of this machine is too old for it, it serves CUDA {major}.{minor} at "
            "most; update the driver, or install a PyTorch that is built for an older CUDA"
        ), True
    return f"{built}, and cannot use the GPU of this machine: {found.splitlines()[0]}", True


def n_gpus() -> int:
    """Devices that PyTorch calls cuda and that can be used now: NVIDIA's, or AMD's by ROCm."""
    found = accelerator()
    return found.count if found.type == "cuda" else 0


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is the machine's accelerator, or the CPU where there is none.

    Of several accelerators rank number `local_rank` of the machine has that one, unless the name has a number. A GPU
    that cannot be used is no error for "auto": a warning says why. Raises `UserError` where a device that was named
    cannot be had.
    """
    found = accelerator()
    if name == "auto" and not found.count:
        if found.is_fault:
            log.warning(f"the CPU is used: {found.obstacle}")
        return torch.device("cpu")
    device = torch.device(str(found.type)) if name == "auto" else _named_device(name, found)
    if device.type == "cpu" or device.index is not None:
        return device
    if local_rank >= found.count:
        raise UserError(
            f"rank {local_rank} of this machine has no {device.type} device of its own, there are {found.count}: start "
            "as many ranks as there are devices, or use the device cpu"
        )
    return torch.device(device.type, local_rank)


def _named_device(name: str, found: Accelerator) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'"{name}" is not a device: use auto, cpu or cuda') from error
    if device.type == "cpu":
        return device
    if device.type != found.type or not found.count:
        why = found.obstacle or f"this machine has {found.type}"
        raise UserError(f'device "{name}" asked for, but {why}: use auto or cpu')
    if (device.index or 0) >= found.count:
        raise UserError(f'device "{name}" asked for, the last of {found.count} here is {device.type}:{found.count - 1}')
    return device


def describe(device: torch.device) -> str:
    """One line for people: the accelerator's name, or the CPU and its threads."""
    if device.type == "cpu":
        n_threads = torch.get_num_threads()
        return f"cpu, {n_threads} thread{'s' * (n_threads != 1)}"
    return f"{device_name(device)} ({device})"


def device_name(device: torch.device) -> str:
    """What the maker of an accelerator calls it, or its type where PyTorch does not tell (MPS)."""
    return getattr(torch.get_device_module(device), "get_device_name", lambda device: device.type)(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's, of any shape, on a device, without waiting for it: a GPU copies from pinned memory."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def random_state(device: torch.device) -> Tensor:
    """A copy of the state of the generator that draws on `device`, a tensor of bytes."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Go on drawing on `device` from this state, (bytes,) of uint8."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be allocated now; None where the system does not tell."""
    if device.type != "cpu":
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)  # not for MPS
        return ask(device)[0] if ask else None
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
    ask = getattr(torch.get_device_module(device), "max_memory_allocated", None)  # not for MPS, which shares the host's
    if device.type != "cpu" and ask:
        return ask(device)
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of the device; None where nobody has stated them."""
    if device.type == "cpu":
        return None
    name = device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
