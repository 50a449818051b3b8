"""Which dispatcher carries the tokens of a run."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch.distributed import ProcessGroup

from core.comm.all_to_all import AllToAll
from core.comm.deepep import DeepEP
from core.comm.hybridep import HybridEP
from core.comm.reference import Reference
from core.comm.transport import bind
from core.config.errors import UserError
from core.nn.dispatch import Dispatcher

Backend = Literal["standard", "deepep", "hybridep", "reference"]
"""As `parallelism.expert_parallel_comm_backend` has it."""


def dispatchers(
    backend: Backend, device: torch.device, *, capacity_factor: float | None = None
) -> Callable[[ProcessGroup], Dispatcher]:
    """What gives each process group of experts its dispatcher; all ranks of the group call it, when meshes are wired.

    Raises `UserError` when the backend cannot run on `device`, with the reason.
    """
    if backend in ("deepep", "hybridep"):
        reason = why_not(device)
        raise UserError(f"parallelism.expert_parallel_comm_backend {backend} cannot run: {reason}")
    made: dict[Backend, Callable[[ProcessGroup], Dispatcher]] = {
        "standard": AllToAll,
        "deepep": DeepEP,
        "hybridep": partial(HybridEP, capacity_factor=capacity_factor),
        "reference": by_reference,
    }
    return made[backend]


def by_reference(group: ProcessGroup) -> DeepEP:
    """A dispatcher whose operations are the reference's on every device."""
    bind(group, Reference(group))
    return DeepEP(group)


def why_not(device: torch.device) -> str:
    """Why DeepEP and HybridEP do not run here, and what to do."""
    if device.type != "cuda":
        return f"it needs NVIDIA GPUs, and this run is on {device.type}; use reference, which runs DeepEP's operations"
    if find_spec("deep_ep") is None:
        return "not importable: there is no package deep_ep; build it from source, or use standard"
    return "not importable: this version has no adapter for deep_ep; use standard"
