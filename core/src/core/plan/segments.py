"""A training step as a row of segments: what each leaves alive, how high it goes, what it computes and sends."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.activation_checkpoint.meter import Meter
from core.activation_checkpoint.survey import flops
from core.nn.decoder import Decoder
from core.plan.traffic import message

ITEM = torch.ops.aten._local_scalar_dense.default


class MessageKind(NamedTuple):
    """What messages have in common: the axis of the mesh along which they go, and the collective."""

    axis: str
    collective: str


@dataclass(kw_only=True)
class Segment:
    """A stretch of a step; its bytes are those beside what stood before the step."""

    what: str
    block: int | None
    """The block whose forward or backward this is."""
    change: int
    """Bytes alive at the end less those at the start."""
    rise: int
    """The most bytes alive less those at the start."""
    gradients: int
    """The part of `change` that is gradients of stored weights."""
    flops: int
    calls: Counter[MessageKind]
    """Number of messages that this rank sends."""
    sent: Counter[MessageKind]
    """Their bytes."""


class Recorder(Meter):
    """Cuts a step on fake tensors into segments: each `mark` ends one.

    `axes` gives the axis of a process group by its name, `gradients` the bytes of all gradients of stored weights.
    Every number that the host reads is 1: fake tensors have none.
    """

    def __init__(self, axes: Mapping[str, str], gradients: Callable[[], int]) -> None:
        super().__init__()
        self.axes, self.gradients = axes, gradients
        self.segments: list[Segment] = []
        self.running: int | None = None
        self._begin()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is ITEM:
            return 1
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented:
            self.flops += flops(func, args, kwargs or {}, out)
            if (found := message(func, args, out)) is not None:
                self.note(MessageKind(self.axes[found.group.group_name], found.collective), found.n_bytes)
        return out

    def note(self, kind: MessageKind, n_bytes: int) -> None:
        """Count a message of this rank."""
        self.calls[kind] += 1
        self.sent[kind] += n_bytes

    def mark(self, what: str, block: int | None = None) -> None:
        """End the segment that did `what`, and begin another."""
        self.segments.append(
            Segment(
                what=what,
                block=block,
                change=self.alive - self.start,
                rise=self.peak - self.start,
                gradients=self.gradients() - self.start_gradients,
                flops=self.flops,
                calls=self.calls,
                sent=self.sent,
            )
        )
        self._begin()

    def _begin(self) -> None:
        self.start = self.peak = self.alive
        self.start_gradients = self.gradients()
        self.flops = 0
        self.calls: Counter[MessageKind] = Counter()
        self.sent: Counter[MessageKind] = Counter()

    @contextmanager
    def listening(self, models: Iterable[Decoder]) -> Iterator[None]:
        """While this runs, every block of `models` marks the ends of its forward and of its backward."""
        blocks = [(int(name), block) for model in models for name, block in model.layers.items()]
        hooks = [block.register_forward_hook(partial(self._after_forward, number)) for number, block in blocks]
        yield
        for hook in hooks:
            hook.remove()

    def end(self, what: str) -> list[Segment]:
        """End a pass, whose last segment did `what` if it was not a block's backward; returns its segments."""
        self._after_backward(None, what)
        segments, self.segments = self.segments, []
        return segments

    def _after_forward(self, number: int, block: nn.Module, inputs: Any, out: Tensor) -> None:
        self.mark("forward", number)
        if out.requires_grad:
            out.register_hook(lambda _: self._after_backward(number, "backward of the head"))

    def _after_backward(self, following: int | None, what: str) -> None:
        """The backward of the running block has ended, or what came before all blocks; that of `following` begins."""
        self.mark(what if self.running is None else "backward", self.running)
        self.running = following


def expand(segments: list[Segment], stand_in: Mapping[int, int]) -> Iterator[Segment]:
    """The segments of all blocks, from those of some: block i does as block `stand_in[i]`, which is among them."""
    known = {segment.block: segment for segment in segments if segment.block is not None}
    if not known or all(i == other for i, other in stand_in.items()):
        yield from segments
        return
    places = [place for place, segment in enumerate(segments) if segment.block is not None]
    falling = segments[places[0]].what == "backward"
    yield from segments[: places[0]]
    for number in sorted(stand_in, reverse=falling):
        if stand_in[number] in known:  # below frozen weights alone there is no backward
            yield replace(known[stand_in[number]], block=number)
    yield from segments[places[-1] + 1 :]


@dataclass(kw_only=True)
class Total:
    """A whole step; bytes are those beside what stood before it."""

    peak: int = 0
    """The most bytes alive at once."""
    peak_at: str = ""
    """What was done then."""
    peak_activations: int = 0
    """The most bytes alive at once that are no gradients of stored weights."""
    flops: int = 0
    calls: Counter[MessageKind] = field(default_factory=Counter)
    sent: Counter[MessageKind] = field(default_factory=Counter)


def total(segments: Iterable[Segment]) -> Total:
    """What a step of these segments comes to."""
    found = Total()
    alive = gradients = 0
    for segment in segments:
        high = alive + segment.rise
        if high > found.peak:
            found.peak = high
            found.peak_at = segment.what if segment.block is None else f"{segment.what} of block {segment.block}"
        found.peak_activations = max(found.peak_activations, high - gradients)
        alive += segment.change
        gradients += segment.gradients
        found.flops += segment.flops
        found.calls.update(segment.calls)
        found.sent.update(segment.sent)
    return found
