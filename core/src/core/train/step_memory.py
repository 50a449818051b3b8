"""Where the memory of a step goes: the tensors that are there when it has the most, by what they are for."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import UntypedStorage

from core.activation_checkpoint.meter import Meter
from core.nn.decoder import Decoder
from core.optim.optimizer import Optimizer
from core.optim.weight import local_bytes
from core.runtime.device import MIB

Returned = TypeVar("Returned")


class MemoryPart(StrEnum):
    """What memory is for."""

    WEIGHTS = "weights"
    OPTIMIZER = "optimizer"
    GRADIENTS = "gradients"
    BLOCKS = "activations of blocks"
    HEAD = "embedding, head, loss"
    BACKWARD = "at work in backward"
    UPDATE = "at work in the update"


class PeakParts(NamedTuple):
    """Bytes by part when a step had the most, and what it was doing then."""

    parts: dict[str, int]
    doing: str

    def table(self, title: str) -> str:
        """The parts as text, in MiB."""
        total = sum(self.parts.values()) or 1
        lines = [title, "", f"{'':36}{'MiB':>12}{'share':>9}"]
        lines += [f"{part:36}{n / MIB:12,.2f}{n / total:9.1%}" for part, n in self.parts.items()]
        lines += [f"{'all tensors':36}{total / MIB:12,.2f}", f"the most is there in {self.doing}"]
        return "\n".join(lines) + "\n"


class PartMeter(Meter):
    """Counts as a `Meter` does, and by what was computed when a storage was made; `at_peak` is the count at the peak.

    `models` are the stages of this rank. What is made in backward and is a gradient of a weight counts as that.
    """

    def __init__(self, models: Sequence[Decoder]) -> None:
        super().__init__()
        self.models = list(models)
        self.at_peak = PeakParts({}, "")
        self._by_part: Counter[str] = Counter()
        self._part_of: dict[int, str] = {}
        self._block, self._is_behind = "", False

    def listening(self) -> ExitStack:
        """While this is open, blocks say that they run."""
        hooks = ExitStack()
        for model in self.models:
            hooks.callback(model.register_forward_pre_hook(self._at_forward).remove)
            for number, block in model.layers.items():
                enter, leave = partial(self._enter, f"layers.{number}"), partial(self._enter, "")
                hooks.callback(block.register_forward_pre_hook(enter).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
        return hooks

    def _at_forward(self, *_: Any) -> None:
        self._is_behind = False

    def _enter(self, block: str, *_: Any) -> None:
        if not in_backward():  # a recomputation may end before the block does
            self._block = block

    def _now(self) -> tuple[str, str]:
        """The part of what is made now, and what the step is doing."""
        if in_backward():
            self._is_behind = True
            return MemoryPart.BACKWARD, "backward"
        if self._block:
            return MemoryPart.BLOCKS, f"the forward of {self._block}"
        if self._is_behind:
            return MemoryPart.UPDATE, "the update"
        return MemoryPart.HEAD, "the forward of embedding, head and loss"

    def _count(self, storage: UntypedStorage) -> None:
        key, before, peak, (part, doing) = id(storage), self.alive, self.peak, self._now()
        part = self._part_of.setdefault(key, part)
        super()._count(storage)
        self._by_part[part] += self.alive - before
        if self.peak > peak:
            gradients = sum(local_bytes(weight.grad) for model in self.models for weight in model.parameters())
            self.at_peak = PeakParts({**self._by_part, MemoryPart.GRADIENTS: gradients}, doing)

    def _forget(self, key: int) -> None:
        before = self.alive
        super()._forget(key)
        self._by_part[self._part_of.pop(key, MemoryPart.HEAD)] += self.alive - before


def in_backward() -> bool:
    """Whether this thread runs autograd's backward."""
    return torch._C._current_graph_task_id() != -1


def measured_memory(
    take: Callable[[], Returned], models: Sequence[Decoder], optimizer: Optimizer
) -> tuple[Returned, PeakParts]:
    """What `take` returns, a step of these models, and the bytes of tensors on this rank when there were the most."""
    meter = PartMeter(models)
    with meter.listening(), meter:
        found = take()
    made = Counter(meter.at_peak.parts)
    made[MemoryPart.BACKWARD] -= made[MemoryPart.GRADIENTS]
    made[MemoryPart.WEIGHTS] = sum(local_bytes(weight) for model in models for weight in model.parameters())
    made[MemoryPart.OPTIMIZER] = sum(
        local_bytes(tensor) for kept in optimizer.state.values() for tensor in kept.values()
    )
    return found, PeakParts({part: made[part] for part in MemoryPart}, meter.at_peak.doing)
