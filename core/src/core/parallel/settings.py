"""How a run is spread over ranks, as settings, and what must hold before a process group is made."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, NamedTuple

from core.config.configurable import Configurable, range_problems
from core.config.record import absolute


class Degrees(NamedTuple):
    """How many ranks share each kind of work; their product is the number of ranks, expert aside.

    `shard` ranks read different rows and share the weights among them, as `context` ranks do, which share rows;
    `expert` ranks are found among those of shard, context and tensor.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    @property
    def sequence_multiple(self) -> int:
        """What a row's length must be a multiple of."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)


def describe_degrees(degrees: Degrees, comm_backend: str) -> str:
    """The number of ranks, and the degrees that are not 1, for people; `comm_backend` is how tokens reach experts."""
    words = " x ".join(f"{axis} {n}" for axis, n in degrees._asdict().items() if n > 1 and axis != "expert")
    experts = f", experts over {degrees.expert} by {comm_backend}" if degrees.expert > 1 else ""
    return f"{degrees.world} ({words}{experts})" if words else f"{degrees.world}"


PipelineSchedule = Literal[
    "1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
SINGLE_STAGE = ("1F1B", "GPipe")
ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


MOST_RANKS = 2**17
"""Of one run; a plan for so many is made in half a minute."""


@dataclass(kw_only=True, slots=True)
class Parallelism(Configurable.Config):
    """How the ranks of a run share its work."""

    data_parallel_replicate_degree: int = 1
    """Copies of the weights; ranks in between share one copy."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the weights and read different rows (FSDP); -1 is all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether a block's gathered weights are let go after its forward; default does unless there is a pipeline."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory."""
    tensor_parallel_degree: int = 1
    """Ranks that share each row: heads, hidden widths and vocabulary inside the parts, tokens in between."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with products (symmetric memory of GPUs, inside torch.compile)."""
    context_parallel_degree: int = 1
    """Ranks that share each row's tokens; attention gathers keys and values."""
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """headtail gives each rank a piece of the row's head and one of its tail, so that causal work is equal."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """allgather brings all keys to every rank; alltoall brings each rank all tokens of some of the heads."""
    pipeline_parallel_degree: int = 1
    """Ranks that hold different blocks."""
    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """Order of the microbatches' forwards and backwards; see torch.distributed.pipelining."""
    pipeline_parallel_schedule_csv: str | None = None
    """File of a schedule of one's own, as torch's schedules export it; it takes the place of the named one."""
    pipeline_parallel_layers_per_stage: int | None = None
    """Blocks of a stage; None makes one stage per rank, or two where the schedule wants several."""
    pipeline_parallel_split: list[int] = field(default_factory=list)
    """First block of every stage but the first; empty splits evenly."""
    pipeline_parallel_microbatch_size: int = 1
    """Rows of a local batch that travel the pipeline together."""
    expert_parallel_degree: int = 1
    """Ranks that hold different experts; they are found among the shard, context and tensor ranks."""
    expert_parallel_comm_backend: Literal["standard", "deepep", "deepep_v1", "deepep_v2", "hybridep", "reference"] = (
        "standard"
    )
    """How tokens travel to experts: by PyTorch's all-to-all, by the GPU libraries DeepEP or HybridEP, or by the
    reference, which runs DeepEP's operations on every device. deepep is the generation that is installed."""
    hybridep_non_blocking_expert_capacity_factor: float | None = None
    """hybridep: room for arriving rows, as a share of the most that could arrive, so that the host need not wait for
    their number; a run in which more arrive ends with an error. None waits."""

    def places(self) -> dict[str, Any]:
        return {"pipeline_parallel_schedule_csv": absolute(self.pipeline_parallel_schedule_csv)}

    def problems(self) -> Iterator[tuple[str, str]]:
        degrees = [name for name in DEGREES if (name, self[name]) != ("data_parallel_shard_degree", -1)]
        wrong = list(range_problems(self, **dict.fromkeys(degrees, MOST_RANKS)))
        yield from wrong
        if not wrong and (n_ranks := self.degrees(1).world) > MOST_RANKS:
            yield (
                "data_parallel_shard_degree",
                f"the degrees make {n_ranks:,} ranks, at most {MOST_RANKS:,} are possible",
            )
        yield from range_problems(
            self, pipeline_parallel_layers_per_stage=2**20, pipeline_parallel_microbatch_size=2**20
        )
        if self.pipeline_parallel_layers_per_stage is not None and self.pipeline_parallel_split:
            yield "pipeline_parallel_split", "it says where stages begin, and layers_per_stage too: give one of the two"
        yield from self._travel_problems()

    def _travel_problems(self) -> Iterator[tuple[str, str]]:
        backend, factor = self.expert_parallel_comm_backend, self.hybridep_non_blocking_expert_capacity_factor
        if backend != "standard" and self.expert_parallel_degree == 1:
            yield (
                "expert_parallel_comm_backend",
                f"expert_parallel_comm_backend {backend} has no effect with expert_parallel_degree 1, where no token "
                "travels: raise the degree, or leave the backend at standard",
            )
        if factor is None:
            return
        name = "hybridep_non_blocking_expert_capacity_factor"
        if not 0 < factor <= 1:
            yield name, f"{name} {factor} must be above 0 and at most 1, or None"
        if backend != "hybridep":
            yield name, f"{name} has no effect with backend {backend}: use hybridep, or leave it at None"

    def __getitem__(self, name: str) -> int:
        return getattr(self, name)

    def degrees(self, world_size: int) -> Degrees:
        """The degrees on `world_size` ranks, `data_parallel_shard_degree` -1 worked out (at least 1)."""
        fixed = self.data_parallel_replicate_degree * self.tensor_parallel_degree
        fixed *= self.context_parallel_degree * self.pipeline_parallel_degree
        shard = self.data_parallel_shard_degree
        return Degrees(
            pipeline=self.pipeline_parallel_degree,
            replicate=self.data_parallel_replicate_degree,
            shard=max(world_size // fixed, 1) if shard == -1 else shard,
            context=self.context_parallel_degree,
            tensor=self.tensor_parallel_degree,
            expert=self.expert_parallel_degree,
        )

    @property
    def stages_per_rank(self) -> int:
        """How many stages the schedule puts on a rank when nothing else is said."""
        several = self.pipeline_parallel_schedule not in SINGLE_STAGE or self.pipeline_parallel_schedule_csv
        return 2 if several and self.pipeline_parallel_degree > 1 else 1


DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "context_parallel_degree",
    "pipeline_parallel_degree",
    "expert_parallel_degree",
)


def world_problems(parallelism: Parallelism, world_size: int) -> Iterator[tuple[str, str]]:
    """What keeps these degrees from `world_size` ranks: (field, message)."""
    degrees = parallelism.degrees(world_size)
    if degrees.world != world_size:
        stated = {name: parallelism[name] for name in DEGREES[:-1] if parallelism[name] not in (1, -1)}
        product = prod(stated.values())
        words = " x ".join(f"{name} {value}" for name, value in stated.items()) or "all degrees 1"
        yield (
            "data_parallel_shard_degree",
            f"{words} makes {product} ranks, and {world_size} started: change a degree, start {product}, or leave "
            "data_parallel_shard_degree at -1 with a product that divides the ranks",
        )
    among = degrees.shard * degrees.context * degrees.tensor
    if among % degrees.expert:
        fits = ", ".join(str(n) for n in range(1, among + 1) if among % n == 0)
        yield (
            "expert_parallel_degree",
            f"expert_parallel_degree {degrees.expert} must divide shard x context x tensor = {among}: use {fits}",
        )
