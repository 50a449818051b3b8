"""The layouts that a run could have on so many ranks, and why it cannot have the others."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Literal

from core.config.errors import UserError
from core.step.checks import check_run, expert_parts
from core.train.trainer import Trainer

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")
MOST_ROWS = 16
"""Of a microbatch: beyond it products are no faster."""
LEAST_TOKENS = 1024
"""Of a row on each of the context ranks that share it: below it they wait for messages."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks share a step; data ranks are those that are left, and share the weights (FSDP)."""

    pipeline: int = 1
    interleaved: bool = False
    """Two stages on each rank of a pipeline, not one."""
    context: int = 1
    tensor: int = 1
    expert: int = 1
    rows: int = 1
    """Of a microbatch."""
    mode: Mode = "selective"
    """Of activation checkpointing."""
    offload: bool = False
    """Weights, gradients and the optimizer's state in the host's memory."""

    @property
    def degrees(self) -> tuple[int, int, int, int]:
        return self.pipeline, self.context, self.tensor, self.expert

    def data(self, world_size: int) -> int:
        """Ranks that read different rows."""
        return world_size // (self.pipeline * self.context * self.tensor)

    def __str__(self) -> str:
        words = [f"{name} {getattr(self, name)}" for name in ("pipeline", "context", "tensor", "expert")]
        shared = " ".join(word for word in words if not word.endswith(" 1")) or "data alone"
        schedule = " interleaved" * self.interleaved
        return f"{shared}{schedule}, {self.rows} row{'s' * (self.rows > 1)}, {self.mode}{', offload' * self.offload}"


def applied(config: Trainer.Config, layout: Layout, world_size: int) -> Trainer.Config:
    """A copy of a run's configuration in this layout; a step has as many rows as before."""
    found = deepcopy(config)
    parallelism, training = found.parallelism, found.training
    training.global_batch_size = rows_per_step(config, world_size)
    training.local_batch_size = layout.rows
    parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree = 1, -1
    parallelism.tensor_parallel_degree = layout.tensor
    parallelism.context_parallel_degree = layout.context
    parallelism.expert_parallel_degree = layout.expert
    parallelism.pipeline_parallel_degree = layout.pipeline
    parallelism.pipeline_parallel_schedule = "Interleaved1F1B" if layout.interleaved else "1F1B"
    parallelism.pipeline_parallel_layers_per_stage, parallelism.pipeline_parallel_split = None, []
    parallelism.cpu_offload = layout.offload
    if layout.pipeline > 1:
        training.local_batch_size = training.global_batch_size // layout.data(world_size)
        parallelism.pipeline_parallel_microbatch_size = layout.rows
    found.activation_checkpoint.mode = layout.mode
    return found


def rows_per_step(config: Trainer.Config, world_size: int) -> int:
    """Rows of a step of this run on so many ranks."""
    return config.training.rows_per_step(config.parallelism.degrees(world_size).data)


def candidates(config: Trainer.Config, world_size: int, ranks_per_host: int) -> Iterator[Layout]:
    """All layouts of powers of two whose degrees fit the ranks and whose microbatches fit the rows of a step.

    Tensor ranks share a host: what they send is waited for. Modes are those without choices of their own.
    """
    rows, model = rows_per_step(config, world_size), config.model
    most_experts = max((part.router.n_experts for part in expert_parts(model)), default=1)
    contexts = powers(max(config.training.seq_len // LEAST_TOKENS, 1))
    for pipeline, context, tensor in product(powers(model.n_layers), contexts, powers(ranks_per_host)):
        data, more = divmod(world_size, pipeline * context * tensor)
        if more or not data or rows % data:
            continue
        for expert, n_rows in product(powers(most_experts), powers(min(rows // data, MOST_ROWS))):
            if (data * context * tensor) % expert or rows % (data * n_rows):
                continue
            for interleaved, mode, offload in product((False, True)[: 1 + (pipeline > 1)], MODES, (False, True)):
                yield Layout(
                    pipeline=pipeline,
                    interleaved=interleaved,
                    context=context,
                    tensor=tensor,
                    expert=expert,
                    rows=n_rows,
                    mode=mode,
                    offload=offload,
                )


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to this."""
    return [2**i for i in range(most.bit_length())]


def possible(
    config: Trainer.Config, world_size: int, layouts: Iterable[Layout]
) -> tuple[list[Layout], dict[str, list[Layout]]]:
    """The layouts that a run's checks let pass, and the others by the first reason."""
    passed: list[Layout] = []
    refused: dict[str, list[Layout]] = {}
    for layout in layouts:
        if found := reason(applied(config, layout, world_size), world_size):
            refused.setdefault(found, []).append(layout)
        else:
            passed.append(layout)
    return passed, refused


def reason(config: Trainer.Config, world_size: int) -> str:
    """What keeps the run from these ranks, in a line; empty where nothing does."""
    try:
        check_run(config, world_size)
    except UserError as error:
        return str(error).splitlines()[0]
    return ""
