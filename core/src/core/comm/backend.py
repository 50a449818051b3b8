"""Which dispatcher carries the tokens of a run."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed import ProcessGroup

from core.comm import deepep_v1, deepep_v2, hybridep_library
from core.comm.all_to_all import AllToAll
from core.comm.deepep import DeepEP
from core.comm.deepep_library import DeepEPLibrary
from core.comm.deepep_v1 import BufferTransport
from core.comm.deepep_v2 import ElasticBufferTransport
from core.comm.hybridep import HybridEP
from core.comm.hybridep_library import HybridEPBufferTransport
from core.comm.probe import Build, missing
from core.comm.reference import Reference
from core.comm.transport import Sizes, bind, bound
from core.config.errors import UserError, joined
from core.nn.dispatch import Dispatcher

log = logging.getLogger("armature")

Backend = Literal["standard", "deepep", "deepep_v1", "deepep_v2", "hybridep", "reference"]
"""As `parallelism.expert_parallel_comm_backend` has it."""
SETTING = "parallelism.expert_parallel_comm_backend"


class Adapter(NamedTuple):
    """What binds a build of `deep_ep`: its transport, what keeps a run from it, and the dispatcher over it."""

    transport: type[DeepEPLibrary] | type[HybridEPBufferTransport]
    problems: Callable[[Sizes], Iterator[str]]
    dispatcher: type[DeepEP] | type[HybridEP]


ADAPTERS: dict[Build, Adapter] = {
    "deepep_v1": Adapter(BufferTransport, deepep_v1.problems, DeepEP),
    "deepep_v2": Adapter(ElasticBufferTransport, deepep_v2.problems, DeepEP),
    "hybridep": Adapter(HybridEPBufferTransport, hybridep_library.problems, HybridEP),
}


def dispatchers(
    backend: Backend, device: torch.device, sizes: Sizes | None = None, *, capacity_factor: float | None = None
) -> Callable[[ProcessGroup], Dispatcher]:
    """What returns a process group's dispatcher of experts; all its ranks call it, when meshes are wired.

    DeepEP and HybridEP make buffers for `sizes` then, one for each group. Raises `UserError` when the backend cannot
    run on `device` or carry what `sizes` say.
    """
    backend = installed(backend, device)
    if backend == "standard":
        return AllToAll
    if backend == "reference":
        return by_reference
    assert backend != "deepep" and sizes is not None, f"{backend} makes buffers, and nobody said how large"
    adapter = ADAPTERS[backend]
    if problems := [(SETTING, message) for message in adapter.problems(sizes)]:
        raise joined(problems)
    options = {"capacity_factor": capacity_factor} if backend == "hybridep" else {}
    return partial(by_library, adapter, sizes, options)


def installed(backend: Backend, device: torch.device) -> Backend:
    """The backend with the generation of DeepEP that is there, as a run's config.json names it.

    Raises `UserError` where a library was asked for that is not there, or not for this device.
    """
    if backend in ("standard", "reference"):
        return backend
    if device.type != "cuda":
        raise UserError(
            f"{SETTING} {backend} cannot run: it needs NVIDIA GPUs, and this run is on {device.type}; use reference, "
            "which runs DeepEP's operations, or standard"
        )
    builds: list[Build] = ["deepep_v2", "deepep_v1"] if backend == "deepep" else [backend]
    reasons = {build: missing(build) for build in builds}
    found = next((build for build, reason in reasons.items() if reason is None), None)
    if found is None:
        raise UserError(f"{SETTING} {backend} cannot run: {reasons[builds[0]]}")
    return found


def by_reference(group: ProcessGroup) -> DeepEP:
    """A dispatcher whose operations are the reference's on every device."""
    bind(group, Reference(group))
    return DeepEP(group)


def by_library(adapter: Adapter, sizes: Sizes, options: dict[str, Any], group: ProcessGroup) -> Dispatcher:
    """A dispatcher over a library, whose buffer is made when the first layer asks for this group.

    Where PyTorch is deterministic it fills new memory by default, which would happen while the library writes there.
    """
    if bound(adapter.transport.namespace, group.group_name) is None:
        if torch.are_deterministic_algorithms_enabled():
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
        transport = adapter.transport(group, sizes)
        bind(group, transport)
        log.info(f"tokens travel to experts by {transport.description}")
    return adapter.dispatcher(group, **options)
