"""Seconds of a layout's messages: bytes over the bandwidth of the wires that they go along, and a delay for each rank
that a message passes.

NCCL sends what is gathered and scattered around a ring, in which it passes every rank once, hosts one behind the other,
and sums that all ranks get up and down a tree.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from autolayout.hardware import Hardware
from autolayout.layout import Layout
from autolayout.measure import Part
from core.plan.segments import MessageKind

FSDP_AXES = ("shard", "expert shard")
"""Where weights are gathered, and gradients summed."""


@dataclass(kw_only=True)
class Sent:
    """Seconds of one microbatch's messages in a part of a step."""

    waited: dict[str, float] = field(default_factory=dict)
    """Those that the computation waits for, by axis."""
    gathered: float = 0.0
    """FSDP's weights, beside the computation."""
    scattered: float = 0.0
    """FSDP's gradients, likewise."""


class Wires:
    """What messages take in a layout of so many ranks."""

    def __init__(self, layout: Layout, found: Hardware, world_size: int) -> None:
        self.layout, self.hardware, self.world_size = layout, found, world_size

    def group(self, axis: str) -> tuple[int, int]:
        """Ranks of a group along an axis, and how far they are apart: of how many ranks one is in the group."""
        layout = self.layout
        near = {"tensor": (layout.tensor, 1), "context": (layout.context, layout.tensor)}
        near["expert"] = max(layout.expert // layout.tensor, 1), layout.tensor
        every = self.world_size // layout.pipeline
        return near.get(axis, (max(every // layout.tensor, 1), layout.tensor))

    def inside(self, axis: str) -> bool:
        """Whether a group along an axis lies in one host."""
        n, apart = self.group(axis)
        return n * apart <= self.hardware.ranks_per_host

    def bytes_a_second(self, axis: str) -> float:
        """What a rank sends along an axis."""
        rate = self.hardware.inner_gb_s if self.inside(axis) else self.hardware.outer_gb_s
        if self.layout.offload and is_fsdp(axis):
            rate = min(self.hardware.host_gb_s, self.hardware.outer_gb_s)
        return rate * 1e9

    def delay(self, kind: MessageKind) -> float:
        """Seconds that a message takes beside those of its bytes, as it goes from rank to rank."""
        n, apart = self.group(kind.axis)
        hosts = 1 if self.inside(kind.axis) else min(n, -(-n * apart // self.hardware.ranks_per_host))
        if kind.collective == "all-reduce":
            within, between = 2 * math.log2(max(n // hosts, 1)), 2 * math.log2(hosts)
        else:
            within, between = n - hosts, hosts if hosts > 1 else 0
        return (within * self.hardware.inner_delay_us + between * self.hardware.outer_delay_us) / 1e6

    def sent(self, part: Part, *, asynchronous: bool) -> Sent:
        """What a part of a step sends in a microbatch of the layout's rows.

        FSDP's are those along its axes that do not grow with the rows: the others carry keys and values.
        """
        found, rows = Sent(), self.layout.rows
        for kind, line in part.sent.items():
            seconds = self.delay(kind) * part.calls[kind]
            if is_fsdp(kind.axis):
                seconds += line.fixed / self.bytes_a_second(kind.axis)
                if kind.collective == "all-gather":
                    found.gathered += seconds
                else:
                    found.scattered += seconds
                n_bytes, seconds = line.per_row * rows, 0.0
            else:
                n_bytes = line.at(rows)
            if n_bytes:
                seconds += n_bytes / self.bytes_a_second(kind.axis)
                axis = waited_axis(kind.axis)
                hidden = self.hardware.overlap if asynchronous and axis == "tensor" else 0.0
                found.waited[axis] = found.waited.get(axis, 0.0) + seconds * (1 - hidden)
        return found


def is_fsdp(axis: str) -> bool:
    """Whether weights are shared along an axis."""
    return any(name in FSDP_AXES for name in axis.split("/"))


def waited_axis(axis: str) -> str:
    """The axis of what is waited for among ranks that share weights as well: of experts, or of keys and values."""
    return "/".join(name for name in axis.split("/") if name not in FSDP_AXES) or "context"


def added(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums of equal names."""
    found: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            found[name] = found.get(name, 0.0) + seconds
    return found
