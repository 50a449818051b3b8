"""What the blocks of a model take of a rank: the planner's steps on fake tensors, shared by many layouts.

A step of r rows changes and raises memory by `fixed + r * per_row`. The fixed part is of weights that are gathered and
of gradients, and depends on the tensor and expert degree alone; so that two numbers of rows are run once for each of
these, and one for each mode and context degree.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from autolayout.layout import Layout, Mode, applied
from core.nn.decoder import Decoder
from core.nn.weights import training_flops_per_token
from core.parallel.pipeline import split_layers
from core.plan.fake_step import StepRecord, run_fake_step
from core.plan.segments import MessageKind, Segment
from core.quantization.converter import converted_model
from core.train.trainer import Trainer

GPU = torch.device("cuda")


class Line(NamedTuple):
    """A number that grows with the rows of a microbatch."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> float:
        return self.fixed + rows * self.per_row


@dataclass(frozen=True, kw_only=True)
class Part:
    """The forward or the backward of a block, or of what is not in blocks; bytes and operations of one row."""

    change: Line
    rise: Line
    gradients: int
    flops: int
    sent: dict[MessageKind, Line]
    calls: Counter[MessageKind]
    """Messages of a microbatch, however many rows it has."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model in one piece on one of its ranks."""

    forward: dict[int, Part]
    backward: dict[int, Part]
    head: list[Part]
    """Head, loss and the head's backward."""
    stored: StepRecord
    n_shards: int
    """Ranks that share the weights which tensor parallelism leaves on one."""


class Measurements:
    """The measurements that layouts of one run ask for, each made once."""

    def __init__(self, config: Trainer.Config, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self._records: dict[Layout, StepRecord] = {}
        self._measured: dict[Layout, Measured] = {}

    def of(self, layout: Layout) -> Measured:
        """What a layout's blocks take, had it no pipeline."""
        key = self._key(layout.mode, layout.context, layout.tensor, layout.expert)
        if key not in self._measured:
            plain = self._key("selective", 1, layout.tensor, layout.expert)
            one, two, own = self._record(plain), self._record(replace(plain, rows=2)), self._record(key)
            n_shards = self.world_size // layout.tensor
            self._measured[key] = measured(one, two, own, n_shards)
        return self._measured[key]

    @cached_property
    def model(self) -> Decoder:
        return converted_model(self.config.model, self.config.converters)[0]

    @cached_property
    def shares(self) -> dict[int | str, float]:
        """The part of all weights that lies in each block, and in what stands before and behind them."""
        counts: dict[int | str, int] = {}
        for name, value in self.model.named_parameters():
            first, _, rest = name.partition(".")
            place = int(rest.partition(".")[0]) if first == "layers" else "first" if "emb" in first else "last"
            counts[place] = counts.get(place, 0) + value.numel()
        return {place: count / sum(counts.values()) for place, count in counts.items()}

    @cached_property
    def attention_share(self) -> float:
        """The part of a block's operations that is attention."""
        flops = training_flops_per_token(self.model, self.config.training.seq_len)
        config = self.config.model
        head = 6 * config.dim * config.vocab_size
        return flops.attention / (flops.total - head)

    def stages(self, layout: Layout) -> list[range]:
        """The blocks of each stage of the pipeline, or of the model."""
        run = applied(self.config, layout, self.world_size)
        n_layers = len(self.model.layers)
        return split_layers(run.parallelism, n_layers) if layout.pipeline > 1 else [range(n_layers)]

    def _key(self, mode: Mode, context: int, tensor: int, expert: int) -> Layout:
        return Layout(mode=mode, context=context, tensor=tensor, expert=expert)

    def _record(self, layout: Layout) -> StepRecord:
        if layout not in self._records:
            run = applied(self.config, layout, self.world_size)
            run.training.global_batch_size = -1
            self._records[layout] = run_fake_step(run, world_size=self.world_size, rank=0, device=GPU)
        return self._records[layout]


def measured(one: StepRecord, two: StepRecord, own: StepRecord, n_shards: int) -> Measured:
    """The parts of a step `own` of one row; `one` and `two` rows of a like step say what does not grow with rows."""
    parts = list(zip(one.segments, two.segments, own.segments, strict=True))
    found: dict[str, dict[int, Part]] = {"forward": {}, "backward": {}}
    head: list[Part] = []
    for a, b, c in parts:
        assert (a.what, a.block) == (b.what, b.block) == (c.what, c.block)
        part = part_of(a, b, c)
        if c.block is None:
            head.append(part)
        else:
            found[c.what][c.block] = part
    return Measured(**found, head=head, stored=own, n_shards=n_shards)


def part_of(one: Segment, two: Segment, own: Segment) -> Part:
    """One part of a step."""
    change, rise = (
        Line(fixed := 2 * getattr(one, name) - getattr(two, name), getattr(own, name) - fixed)
        for name in ("change", "rise")
    )
    of_one, of_two, of_own = (by_axis(each.sent) for each in (one, two, own))
    sent = {}
    for kind in of_own:
        fixed = 2 * of_one[kind] - of_two[kind]
        sent[kind] = Line(fixed, of_own[kind] - fixed)
    return Part(change=change, rise=rise, gradients=own.gradients, flops=own.flops, sent=sent, calls=by_axis(own.calls))


def by_axis(counts: Counter[MessageKind]) -> Counter[MessageKind]:
    """Bytes or numbers of messages; along ranks that share weights as in a layout without context ranks."""
    found: Counter[MessageKind] = Counter()
    for kind, n in counts.items():
        axes = kind.axis.split("/")
        axis = "/".join(name for name in axes if name != "context") if "shard" in axes else kind.axis
        found[kind._replace(axis=axis)] += n
    return found
