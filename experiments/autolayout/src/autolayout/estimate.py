"""What a layout takes: memory and time of its slowest and fullest rank, put together from measured blocks.

A pipeline holds gathered weights and whole gradients from its first microbatch to its last, and so does a step of
several microbatches with the gradients. A microbatch takes as long as the slowest stage; behind that stands the bubble,
in which a pipeline fills and empties. FSDP's messages run beside the computation, all others are waited for, keys and
values that context ranks exchange among them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from autolayout.hardware import Hardware
from autolayout.layout import Layout, rows_per_step
from autolayout.measure import Measured, Measurements, Part
from core.plan.segments import MessageKind, Segment, total
from core.quantization.float8 import Float8LinearConverter
from core.runtime.device import GIB
from core.train.trainer import Trainer

COMPUTED_BYTES = 2
"""Of a number of a gathered weight, and of a residual."""
FSDP_AXES = ("shard", "expert shard")
"""Where weights are gathered, and gradients summed."""


@dataclass(kw_only=True)
class Estimate:
    """A layout's step."""

    layout: Layout
    peak_bytes: float
    """Of the fullest rank."""
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    """Where the seconds go."""

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / GIB


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
        peak = max(self.memory(layout, measured, own, rank, n_microbatches) for rank, own in enumerate(ranks))
        parts = max(
            (self.times(layout, measured, own, n_microbatches) for own in ranks), key=lambda each: sum(each.values())
        )
        per_rank = len(stages) // layout.pipeline
        parts["bubble"] = sum(parts.values()) * (layout.pipeline - 1) / (n_microbatches * per_rank)
        parts["update"] = self.update(layout, measured, max(map(self.share, ranks)))
        return Estimate(layout=layout, peak_bytes=peak, seconds=sum(parts.values()), parts=parts)

    def share(self, stages: Iterable[range]) -> float:
        """The part of all weights that these stages have."""
        shares, n_layers = self.measurements.shares, len(self.measurements.model.layers)
        blocks = [i for stage in stages for i in stage]
        ends = ["first"] * (0 in blocks) + ["last"] * (n_layers - 1 in blocks)
        return sum(shares.get(place, 0.0) for place in [*blocks, *ends])

    def memory(self, layout: Layout, measured: Measured, stages: list[range], rank: int, n_microbatches: int) -> float:
        """Bytes of a rank at its fullest, device memory alone."""
        share, stored, rows = self.share(stages), measured.stored.stored, layout.rows
        resting = stored.weights + stored.optimizer + stored.gradients
        lying = 0 if layout.offload else resting * share * layout.pipeline
        whole = stored.n_weights * measured.n_shards * share
        sharded = measured.n_shards > layout.pipeline
        if layout.pipeline == 1:
            return lying + self.one_piece(measured, rows, n_microbatches) + stored.buffers + measured.stored.inputs
        held = whole * (COMPUTED_BYTES + 2 * COMPUTED_BYTES) if sharded else 0
        blocks = [i for stage in stages for i in stage]
        in_flight = min(n_microbatches, (layout.pipeline - rank) + (len(stages) - 1) * layout.pipeline)
        activations = sum(measured.forward[i].change.per_row for i in blocks) * rows / len(stages)
        rises = [part.rise.per_row * rows for i in blocks for part in (measured.forward[i], measured.backward[i])]
        if len(self.measurements.model.layers) - 1 in blocks:
            rises += [part.rise.at(rows) for part in measured.head]
        return lying + held + in_flight * activations + max(rises, default=0)

    def one_piece(self, measured: Measured, rows: int, n_microbatches: int) -> float:
        """Bytes beside what lies between steps, without a pipeline."""
        stored = measured.stored.stored
        found = total(segments(measured, rows)).peak - stored.gradients
        return found + (n_microbatches > 1) * stored.n_weights * measured.n_shards * 2 * COMPUTED_BYTES

    def times(self, layout: Layout, measured: Measured, stages: list[range], n_microbatches: int) -> dict[str, float]:
        """Seconds of all microbatches on a rank, by what they are spent on; without the wait for other stages."""
        blocks = [i for stage in stages for i in stage]
        parts = [part for i in blocks for part in (measured.forward[i], measured.backward[i])]
        n_layers = len(self.measurements.model.layers)
        head = measured.head if n_layers - 1 in blocks else []
        compute = self.compute(layout, measured, parts, head, len(blocks))
        found = {name: seconds * n_microbatches for name, seconds in compute.items()}
        waited, beside = self.sent(layout, [*parts, *head], n_microbatches)
        found |= waited
        found["weights and gradients"] = max(beside - sum(found.values()), 0.0)
        if layout.pipeline > 1:
            found["pipeline"] = self.travel(layout) * n_microbatches
        return found

    def compute(
        self, layout: Layout, measured: Measured, parts: list[Part], head: list[Part], n_blocks: int
    ) -> dict[str, float]:
        """Seconds of one microbatch of a stage: products, attention, and what goes through memory."""
        hardware, rows, attention = self.hardware, layout.rows, self.measurements.attention_share
        flops = rows * sum(part.flops for part in parts)
        of_head = rows * sum(part.flops for part in head)
        rate = (hardware.float8_tflops if self.float8 else hardware.matmul_tflops) * 1e12
        needed = 3 * sum(measured.forward[i].flops for i in measured.forward) / len(measured.forward) * n_blocks * rows
        passes = hardware.compiled_passes if self.config.compile.takes("model") else hardware.eager_passes
        again = flops / needed if needed else 1.0
        return {
            "products": flops * (1 - attention) / rate + of_head / (hardware.matmul_tflops * 1e12),
            "attention": flops * attention / (hardware.attention_tflops * 1e12),
            "memory": passes * again * n_blocks * self.residual(layout) / (hardware.memory_gb_s * 1e9),
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

    def sent(self, layout: Layout, parts: list[Part], n_microbatches: int) -> tuple[dict[str, float], float]:
        """Seconds of a step's messages: those that are waited for, by axis, and FSDP's, beside the computation.

        FSDP's are those along its axes that do not grow with the rows: the others carry keys and values.
        """
        waited: dict[str, float] = {}
        beside = 0.0
        for part in parts:
            for kind, line in part.sent.items():
                second = 1 / (self.rate(layout, kind.axis) * 1e9)
                n_bytes = line.at(layout.rows) * n_microbatches
                if is_fsdp(kind):
                    n_bytes = line.per_row * layout.rows * n_microbatches
                    every = kind.collective == "all-gather" and layout.pipeline == 1
                    beside += line.fixed * (n_microbatches if every else 1) * second
                if n_bytes:
                    axis = waited_axis(kind.axis)
                    waited[axis] = waited.get(axis, 0.0) + n_bytes * second
        if self.config.parallelism.enable_async_tensor_parallel and "tensor" in waited:
            waited["tensor"] *= 1 - self.hardware.overlap
        return waited, beside

    def rate(self, layout: Layout, axis: str) -> float:
        """GB a second along an axis: of the wires within a host if a group fits there."""
        if layout.offload and any(name in FSDP_AXES for name in axis.split("/")):
            return min(self.hardware.host_gb_s, self.hardware.outer_gb_s)
        reach = {"tensor": layout.tensor, "context": layout.tensor * layout.context}
        reach["expert"] = max(layout.expert, layout.tensor)
        n = reach.get(axis, self.world_size // layout.pipeline)
        return self.hardware.inner_gb_s if n <= self.hardware.ranks_per_host else self.hardware.outer_gb_s

    def update(self, layout: Layout, measured: Measured, share: float) -> float:
        """Seconds of the optimizer's update: weights and state are read and written, gradients read."""
        stored = measured.stored.stored
        n_bytes = (2 * stored.weights + stored.gradients + 2 * stored.optimizer) * share * layout.pipeline
        return n_bytes / ((self.hardware.host_gb_s if layout.offload else self.hardware.memory_gb_s) * 1e9)


def is_fsdp(kind: MessageKind) -> bool:
    """Whether such messages carry weights or their gradients, where they do not grow with the rows."""
    return any(axis in FSDP_AXES for axis in kind.axis.split("/"))


def waited_axis(axis: str) -> str:
    """The axis of what is waited for among ranks that share weights as well: of experts, or of keys and values."""
    return "/".join(name for name in axis.split("/") if name not in FSDP_AXES) or "context"


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
