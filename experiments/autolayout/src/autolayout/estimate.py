"""What a layout takes: memory and time of its slowest and fullest rank, put together from measured blocks.

A pipeline holds gathered weights and whole gradients from its first microbatch to its last, and so does a step of
several microbatches with the gradients. A microbatch takes as long as the slowest stage; behind that stands the bubble,
in which a pipeline fills and empties. FSDP's messages run beside the computation of the block that they belong to, and
what takes longer than that is waited for; meanwhile the computation is slower, as both use the rank's memory and its
processors. All other messages are waited for, keys and values that context ranks exchange among them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from autolayout.hardware import Hardware
from autolayout.layout import Layout, rows_per_step
from autolayout.measure import Measured, Measurements, Part
from autolayout.messages import Wires, added
from core.plan.segments import Segment, total
from core.quantization.float8 import Float8LinearConverter
from core.runtime.device import GIB
from core.train.trainer import Trainer

COMPUTED_BYTES = 2
"""Of a number of a gathered weight, and of a residual."""


@dataclass(kw_only=True)
class Estimate:
    """A layout's step."""

    layout: Layout
    peak_bytes: float
    """Of the fullest rank, in tensors."""
    resting_bytes: float = 0.0
    """Those of them that lie there between steps."""
    reserve: float = 0.0
    """What the allocator takes more for those that come and go, in parts of them."""
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    """Where the seconds go."""

    @property
    def peak_gib(self) -> float:
        """Memory that the fullest rank takes of its device."""
        passing = max(self.peak_bytes - self.resting_bytes, 0.0)
        return (self.peak_bytes + self.reserve * passing) / GIB


class Estimator:
    """Estimates layouts of one run on one kind of hardware."""

    def __init__(self, config: Trainer.Config, world_size: int, found: Hardware) -> None:
        self.config, self.world_size, self.hardware = config, world_size, found
        self.measurements = Measurements(config, world_size)
        self.rows = rows_per_step(config, world_size)
        self.float8 = any(isinstance(each, Float8LinearConverter.Config) for each in config.converters)

    def __call__(self, layout: Layout) -> Estimate:
        measured = self.measurements.of(layout)
        stages = self.measurements.stages(layout)
        n_microbatches = self.rows // layout.data(self.world_size) // layout.rows
        ranks = [stages[rank :: layout.pipeline] for rank in range(layout.pipeline)]
        resting, peak = max(
            (self.memory(layout, measured, own, rank, n_microbatches) for rank, own in enumerate(ranks)), key=last
        )
        parts = max(
            (self.times(layout, measured, own, n_microbatches) for own in ranks), key=lambda each: sum(each.values())
        )
        per_rank = len(stages) // layout.pipeline
        parts["bubble"] = sum(parts.values()) * (layout.pipeline - 1) / (n_microbatches * per_rank)
        parts["update"] = self.update(layout, measured, max(map(self.share, ranks)))
        return Estimate(
            layout=layout,
            peak_bytes=peak,
            resting_bytes=resting,
            reserve=self.hardware.reserve,
            seconds=sum(parts.values()),
            parts=parts,
        )

    def share(self, stages: Iterable[range]) -> float:
        """The part of all weights that these stages have."""
        shares, n_layers = self.measurements.shares, len(self.measurements.model.layers)
        blocks = [i for stage in stages for i in stage]
        ends = ["first"] * (0 in blocks) + ["last"] * (n_layers - 1 in blocks)
        return sum(shares.get(place, 0.0) for place in [*blocks, *ends])

    def memory(
        self, layout: Layout, measured: Measured, stages: list[range], rank: int, n_microbatches: int
    ) -> tuple[float, float]:
        """Bytes that lie on a rank between steps, and those at its fullest; device memory alone."""
        share, stored, rows = self.share(stages), measured.stored.stored, layout.rows
        resting = stored.weights + stored.optimizer + stored.gradients
        lying = 0 if layout.offload else resting * share * layout.pipeline
        whole = stored.n_weights * measured.n_shards * share
        sharded = measured.n_shards > layout.pipeline
        if layout.pipeline == 1:
            return lying, lying + self.one_piece(
                measured, rows, n_microbatches
            ) + stored.buffers + measured.stored.inputs
        held = whole * (COMPUTED_BYTES + 2 * COMPUTED_BYTES) if sharded else 0
        blocks = [i for stage in stages for i in stage]
        in_flight = min(n_microbatches, (layout.pipeline - rank) + (len(stages) - 1) * layout.pipeline)
        activations = sum(measured.forward[i].change.per_row for i in blocks) * rows / len(stages)
        rises = [part.rise.per_row * rows for i in blocks for part in (measured.forward[i], measured.backward[i])]
        if len(self.measurements.model.layers) - 1 in blocks:
            rises += [part.rise.at(rows) for part in measured.head]
        return lying, lying + held + in_flight * activations + max(rises, default=0)

    def one_piece(self, measured: Measured, rows: int, n_microbatches: int) -> float:
        """Bytes beside what lies between steps, without a pipeline."""
        stored = measured.stored.stored
        found = total(segments(measured, rows)).peak - stored.gradients
        return found + (n_microbatches > 1) * stored.n_weights * measured.n_shards * 2 * COMPUTED_BYTES

    def times(self, layout: Layout, measured: Measured, stages: list[range], n_microbatches: int) -> dict[str, float]:
        """Seconds of all microbatches on a rank, by what they are spent on; without the wait for other stages."""
        blocks, n = [i for stage in stages for i in stage], n_microbatches
        held = layout.pipeline > 1  # weights, once they are gathered
        head = measured.head if len(self.measurements.model.layers) - 1 in blocks else []
        parts = [(measured.forward[i], 1 if held else n) for i in blocks]
        parts += [(measured.backward[i], 0 if held else n) for i in blocks] + [
            (part, 1 if held else n) for part in head
        ]
        wires = Wires(layout, self.hardware, self.world_size)
        asynchronous = self.config.parallelism.enable_async_tensor_parallel
        same_wires = wires.inside("tensor") and wires.inside("shard")
        found: list[dict[str, float]] = []
        for place, (part, n_gathers) in enumerate(parts):
            work = self.work(layout, measured, part, of_head=place >= 2 * len(blocks))
            sent = wires.sent(part, asynchronous=asynchronous)
            found += [{name: n * seconds for name, seconds in each.items()} for each in (work, sent.waited)]
            room = sum(work.values()) + (0.0 if same_wires else sum(sent.waited.values()))
            both = min(n_gathers, 1)
            found.append(self.beside(both * sent.gathered + sent.scattered, room))
            found += [self.beside(sent.gathered, room)] * (n_gathers - both)
        if layout.pipeline > 1:
            found.append({"pipeline": self.travel(layout) * n})
        return added(found)

    def beside(self, seconds: float, room: float) -> dict[str, float]:
        """What FSDP's messages of so many seconds cost beside a computation: what is left of them behind it, and by how
        much they slow it down."""
        return {
            "weights and gradients": max(seconds - room, 0.0),
            "contention": self.hardware.contention * min(seconds, room),
        }

    def work(self, layout: Layout, measured: Measured, part: Part, *, of_head: bool) -> dict[str, float]:
        """Seconds that a microbatch's part of a block computes, or of the head: products, attention, and what goes
        through memory."""
        hardware, flops = self.hardware, layout.rows * part.flops
        if of_head:
            return {"products": flops / (hardware.matmul_tflops * 1e12)}
        needed = 3 * sum(each.flops for each in measured.forward.values()) / len(measured.forward)
        rate = (hardware.float8_tflops if self.float8 else hardware.matmul_tflops) * 1e12
        passes = hardware.compiled_passes if self.config.compile.takes("model") else hardware.eager_passes
        n_bytes = passes * self.residual(layout) * (part.flops / needed if needed else 0.0)
        attention = self.measurements.attention_share
        return {
            "products": flops * (1 - attention) / rate,
            "attention": flops * attention / (hardware.attention_tflops * 1e12),
            "memory": n_bytes / (hardware.memory_gb_s * 1e9),
        }

    def residual(self, layout: Layout) -> float:
        """Bytes of what travels between blocks."""
        tokens = layout.rows * self.config.training.seq_len / (layout.tensor * layout.context)
        return tokens * self.config.model.dim * COMPUTED_BYTES

    def travel(self, layout: Layout) -> float:
        """Seconds of what one microbatch makes a stage send to its neighbours."""
        inside = layout.tensor * layout.context * layout.data(self.world_size) < self.hardware.ranks_per_host
        rate = self.hardware.inner_gb_s if inside else self.hardware.outer_gb_s
        return 2 * self.residual(layout) / (rate * 1e9)

    def update(self, layout: Layout, measured: Measured, share: float) -> float:
        """Seconds of the optimizer's update: weights and state are read and written, gradients read."""
        stored = measured.stored.stored
        n_bytes = (2 * stored.weights + stored.gradients + 2 * stored.optimizer) * share * layout.pipeline
        return n_bytes / ((self.hardware.host_gb_s if layout.offload else self.hardware.memory_gb_s) * 1e9)


def last(pair: tuple[float, float]) -> float:
    return pair[1]


def segments(measured: Measured, rows: int) -> Iterator[Segment]:
    """The segments of a step of one microbatch of a model in one piece."""
    blocks = sorted(measured.forward)
    order = [measured.forward[i] for i in blocks], measured.head, [measured.backward[i] for i in reversed(blocks)]
    for part in (each for parts in order for each in parts):
        yield Segment(
            what="",
            block=None,
            change=int(part.change.at(rows)),
            rise=int(part.rise.at(rows)),
            gradients=part.gradients,
            flops=0,
            calls=Counter(),
            sent=Counter(),
        )
