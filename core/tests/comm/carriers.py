"""What carries tokens in these tests: the reference, and the adapters of the libraries over imitations of them."""

from typing import Any, NamedTuple

import fake_deep_ep
import torch
from token_traffic import D, E, reference
from torch.distributed import ProcessGroup

from core.comm.backend import ADAPTERS, by_library
from core.comm.probe import Build
from core.comm.transport import Sizes, bind, bound
from core.nn.dispatch import Dispatcher


class Carrier(NamedTuple):
    """An adapter, and the imitation that it runs over; neither for the reference."""

    namespace: str
    build: Build | None = None
    flavour: str = ""


CARRIERS = {
    "deepep reference": Carrier("deepep"),
    "deepep v1": Carrier("deepep", "deepep_v1", "v1"),
    "deepep v2.0": Carrier("deepep", "deepep_v2", "v2.0"),
    "deepep v2.1": Carrier("deepep", "deepep_v2", "v2.1"),
    "hybridep reference": Carrier("hybridep"),
    "hybridep 9": Carrier("hybridep", "hybridep", "hybrid-9"),
    "hybridep 11": Carrier("hybridep", "hybridep", "hybrid-11"),
}
EQUAL = 8
"""Tokens of every rank, where a carrier wants equally many; eight are whole pieces for two ranks and for four."""


def of(namespace: str) -> list[str]:
    """The carriers of these operations."""
    return [name for name, carrier in CARRIERS.items() if carrier.namespace == namespace]


def wants_equal(name: str) -> bool:
    """Whether all ranks must send equally many tokens, and some."""
    return CARRIERS[name].build == "hybridep"


def shuffles(name: str) -> bool:
    """Whether rows come in another order in each dispatch."""
    return "v2" in name


def sizes_for(name: str, group: ProcessGroup, dim: int = D, n_tokens: int = 32) -> Sizes:
    """Buffers for `n_tokens`, of which HybridEP's adapter wants exactly as many."""
    return Sizes(n_tokens, dim, E, E, group.size(), torch.float32)


def dispatcher_over(name: str, group: ProcessGroup, *, dim: int = D, n_tokens: int = 32, **options: Any) -> Dispatcher:
    """A dispatcher over a carrier, as a run has it; rows are fp32, in which small differences show."""
    namespace, build, flavour = CARRIERS[name]
    if build is None:
        bind(group, reference(namespace, group))
        return ADAPTERS["hybridep" if namespace == "hybridep" else "deepep_v1"].dispatcher(group, **options)
    fake_deep_ep.install(flavour)
    fake_deep_ep.WIRE[0] = torch.float32
    return by_library(ADAPTERS[build], sizes_for(name, group, dim, n_tokens), options, group)


def carry(name: str, group: ProcessGroup, **sizes: int) -> Any:
    """Let a carrier run the operations of a group; returns its transport."""
    dispatcher_over(name, group, **sizes)
    return bound(CARRIERS[name].namespace, group.group_name)


def deterministic() -> None:
    """As `--debug.deterministic` has it: rows of V2 come in the order of ranks and tokens."""
    torch.use_deterministic_algorithms(True)
