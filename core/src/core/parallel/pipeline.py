"""Pipeline parallelism: a stage is the decoder without the children that live elsewhere.

The loss of a step is one sum over all valid tokens of all ranks, divided by their number, which is counted before the
first forward. PyTorch's schedules know microbatches alone: each returns its loss, and schedules may divide gradients by
the number of microbatches, as if all had equally many valid tokens. Packed text and masks have not, so that a mean of
means would give tokens of short microbatches a larger weight. Hence each microbatch's loss is its sum, already divided
by the step's number; gradients of microbatches are added, and neither the schedule nor FSDP scales them. Only the last
stage has a loss: what is reported is a sum over ranks to which the others add 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from core.config.errors import UserError
from core.data.packing import NO_INPUTS
from core.nn.decoder import Decoder, HeadReader
from core.nn.kernel import Positions
from core.parallel.schedule_file import read_schedule
from core.parallel.settings import V_SHAPED, ZERO_BUBBLE, Parallelism

ENDS = 1
"""What the embedding, and norm and head together, weigh in blocks when blocks are dealt out to stages."""

FORWARD = ("UNSHARD", "RECV_F", "FORWARD", "SEND_F", "WAIT_SEND_F", "RESHARD")
"""PyTorch's names of the actions of a schedule that no backward needs; waits are actions since torch 2.15."""


class Microbatch(NamedTuple):
    """What a rank computes of some rows at a time."""

    tokens_BL: Tensor
    labels_BL: Tensor
    positions: Positions
    n_labels: int
    """Labels of its tokens that count."""
    inputs: Mapping[str, Tensor] = NO_INPUTS
    """What the model reads beside tokens: those of whole rows."""


def n_stages(settings: Parallelism, n_layers: int) -> int:
    """Stages of the whole pipeline."""
    if settings.pipeline_parallel_schedule_csv:
        return sum(map(len, read_schedule(settings.pipeline_parallel_schedule_csv).stages))
    if settings.pipeline_parallel_split:
        return len(settings.pipeline_parallel_split) + 1
    if settings.pipeline_parallel_layers_per_stage is not None:
        return -(-(n_layers + 2 * ENDS) // settings.pipeline_parallel_layers_per_stage)
    return settings.pipeline_parallel_degree * settings.stages_per_rank


def split_layers(settings: Parallelism, n_layers: int) -> list[range]:
    """The blocks of every stage. Evenly, the ends counted as blocks; what is left over goes to the first stages."""
    n = n_stages(settings, n_layers)
    if settings.pipeline_parallel_split:
        starts = [0, *settings.pipeline_parallel_split, n_layers]
    else:
        each, more = divmod(n_layers + 2 * ENDS, n)
        sizes = [each + (i < more) for i in range(n)]
        sizes[0] -= ENDS
        sizes[-1] -= ENDS
        starts = [sum(sizes[:i]) for i in range(n + 1)]
    return [range(first, last) for first, last in pairwise(starts)]


def pipeline_problems(settings: Parallelism, n_layers: int, n_microbatches: int) -> Iterator[tuple[str, str]]:
    """What keeps a model of `n_layers` blocks and a step of `n_microbatches` from this pipeline."""
    degree, schedule = settings.pipeline_parallel_degree, settings.pipeline_parallel_schedule
    if degree == 1:
        return
    if settings.pipeline_parallel_schedule_csv:
        yield from _file_problems(settings.pipeline_parallel_schedule_csv, settings, n_layers, n_microbatches)
        return
    field = "pipeline_parallel_split" if settings.pipeline_parallel_split else "pipeline_parallel_layers_per_stage"
    n = n_stages(settings, n_layers)
    wanted = settings.stages_per_rank
    if n % degree or n < degree * wanted or (wanted == 1 and n != degree) or (schedule in V_SHAPED and n != 2 * degree):
        each = "exactly 2" if schedule in V_SHAPED else "at least 2" if wanted > 1 else "exactly 1"
        yield field, f"{n} stages on {degree} pipeline ranks: schedule {schedule} wants {each} on each rank"
    elif n > n_layers + 2 * ENDS:
        yield field, f"{n_layers} blocks are too few for {n} stages: use fewer stages"
    yield from _split_problems(settings.pipeline_parallel_split, n_layers)
    if n_microbatches < degree:
        yield (
            "pipeline_parallel_microbatch_size",
            f"{n_microbatches} microbatches in a step leave some of {degree} pipeline ranks idle: lower "
            "pipeline_parallel_microbatch_size or raise the batch size",
        )
    elif schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and n_microbatches % degree:
        yield (
            "pipeline_parallel_microbatch_size",
            f"schedule {schedule} wants the microbatches of a step ({n_microbatches}) to be a multiple of "
            f"pipeline_parallel_degree {degree}",
        )
    elif schedule == "DualPipeV" and n_microbatches < 2 * degree:
        yield (
            "pipeline_parallel_microbatch_size",
            f"schedule DualPipeV wants at least {2 * degree} microbatches in a step, there are {n_microbatches}",
        )


def _split_problems(firsts: list[int], n_layers: int) -> Iterator[tuple[str, str]]:
    if any(after <= before for before, after in pairwise(firsts)) or not all(0 <= i <= n_layers for i in firsts):
        yield (
            "pipeline_parallel_split",
            f"pipeline_parallel_split {firsts} must rise, from 0 at least to the number of blocks {n_layers} at most",
        )


def _file_problems(file: str, settings: Parallelism, n_layers: int, n_microbatches: int) -> Iterator[tuple[str, str]]:
    field = "pipeline_parallel_schedule_csv"
    try:
        actions = read_schedule(file)
    except UserError as error:
        yield field, str(error)
        return
    degree, count = settings.pipeline_parallel_degree, sum(map(len, actions.stages))
    if len(actions.stages) != degree:
        yield field, f"{file} is for {len(actions.stages)} ranks, pipeline_parallel_degree is {degree}"
    if actions.n_microbatches != n_microbatches:
        yield (
            field,
            f"{file} is for {actions.n_microbatches} microbatches, a step has {n_microbatches}: change the batch size "
            "or pipeline_parallel_microbatch_size",
        )
    if count > n_layers + 2 * ENDS:
        yield field, f"{file} has {count} stages, too many for {n_layers} blocks"
    if settings.pipeline_parallel_split and len(settings.pipeline_parallel_split) != count - 1:
        yield (
            "pipeline_parallel_split",
            f"it makes {len(settings.pipeline_parallel_split) + 1} stages, {file} has {count}",
        )
    yield from _split_problems(settings.pipeline_parallel_split, n_layers)


def stages_of(rank: int, settings: Parallelism, n_layers: int) -> list[int]:
    """Numbers of the stages that pipeline rank `rank` holds.

    in a loop    rank 0: 0 2    rank 1: 1 3            in a V    rank 0: 0 3    rank 1: 1 2
    """
    if settings.pipeline_parallel_schedule_csv:
        return read_schedule(settings.pipeline_parallel_schedule_csv).stages[rank]
    n, degree = n_stages(settings, n_layers), settings.pipeline_parallel_degree
    if settings.pipeline_parallel_schedule in V_SHAPED:
        return [rank, n - 1 - rank]
    return list(range(rank, n, degree))


def cut_stage(model: Decoder, stages: list[range], number: int) -> None:
    """Leave the blocks of stage `number` of `model`; the first stage embeds, the last has norm and head."""
    for name in list(model.layers):
        if int(name) not in stages[number]:
            del model.layers[name]
    if number > 0:
        model.tok_embeddings = None
    if number < len(stages) - 1:
        model.norm = model.output = None


def stage_of(name: str, stages: list[range]) -> int:
    """The number of the stage that `cut_stage` leaves a weight of this name to."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return 0 if first == "tok_embeddings" else len(stages) - 1
    block = int(rest.partition(".")[0])
    return next(number for number, blocks in enumerate(stages) if block in blocks)


class Pipeline:
    """The stages of this rank under a schedule of torch.distributed.pipelining."""

    def __init__(
        self,
        parts: dict[int, Decoder],
        settings: Parallelism,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        n_stages: int,
        n_microbatches: int,
    ) -> None:
        from torch.distributed.pipelining.schedules import (
            PipelineScheduleMulti,
            _PipelineScheduleRuntime,
            get_schedule_class,
        )

        from core.parallel.stage import Stage  # loads what a run without a pipeline saves

        group = mesh.get_group()
        self.stages = [Stage(part, i, n_stages, device, group=group) for i, part in parts.items()]
        csv = settings.pipeline_parallel_schedule_csv
        kind = _PipelineScheduleRuntime if csv else get_schedule_class(settings.pipeline_parallel_schedule)
        several = issubclass(kind, PipelineScheduleMulti)
        self.schedule: Any = kind(
            self.stages if several else self.stages[0],  # pyrefly: ignore[bad-argument-type] - by kind
            n_microbatches=n_microbatches,
            loss_fn=lambda output, _: output,
            scale_grads=False,
        )
        if csv:
            self.schedule._load_csv(csv)
        self.n_microbatches = n_microbatches
        self._initialize: Any = getattr(self.schedule, "_initialize_stages" if several else "_initialize_stage")
        """Runs a first microbatch through the stages once, to learn shapes."""
        self._learns_backward = "target" in signature(self._initialize).parameters
        """Whether it runs a backward as well, which needs labels (torch 2.12)."""

    def run(
        self, microbatches: Sequence[Microbatch], reader: Callable[[Microbatch], HeadReader], *, backward: bool
    ) -> list[Tensor]:
        """The losses of all microbatches, as `reader` of each reads them, on the rank of the last stage, nothing on the
        others; gradients with `backward`.

        Microbatches come cut, so that each has its own `positions`: `step` of torch 2.13 would cut them itself.
        """
        assert len(microbatches) == self.n_microbatches, f"{len(microbatches)} of {self.n_microbatches} microbatches"
        first, last = (any(getattr(stage, end) for stage in self.stages) for end in ("is_first", "is_last"))
        losses: list[Tensor] = []
        self.schedule._has_backward = backward
        for stage in self.stages:
            stage.has_backward = backward
            stage.clear_runtime_states()
        inputs: list[tuple[Tensor, ...]] = [(batch.tokens_BL,) if first else () for batch in microbatches]
        others = [{"positions": batch.positions, "read": reader(batch)} for batch in microbatches]
        labels = [batch.labels_BL for batch in microbatches] if last else None
        with self._uncounted():
            self._initialize(inputs[0], others[0], *[labels and labels[0]] * self._learns_backward)
        with nullcontext() if backward else self._forward_only():
            self.schedule._step_microbatches(inputs, others, labels, losses if last else None, return_outputs=False)
        return losses

    @contextmanager
    def _forward_only(self) -> Iterator[None]:
        """Schedules without their backward actions while the block runs: those in a V fail at them (torch 2.13)."""
        ranks = getattr(self.schedule, "pipeline_order_with_comms", None)
        if ranks is not None:
            self.schedule.pipeline_order_with_comms = {rank: forward_actions(ranks[rank]) for rank in ranks}
        yield
        if ranks is not None:
            self.schedule.pipeline_order_with_comms = ranks

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Evaluation mode while the block runs: a trial run must not count as training."""
        modes = [stage.submod.training for stage in self.stages]
        for stage in self.stages:
            stage.submod.eval()
        yield
        for stage, training in zip(self.stages, modes, strict=True):
            stage.submod.train(training)


def forward_actions(actions: list[Any]) -> list[Any]:
    """Of a rank's actions, of which some are two at once, those without a backward."""
    single = [part for action in actions for part in action.sub_actions or [action]]
    return [part for part in single if part.computation_type.name in FORWARD]


def checkpoint_problem(settings: Parallelism, mode: str) -> str | None:
    """Why a schedule and activation checkpointing do not go together; None if they do.

    Outputs that selective checkpointing saved are given out once, and a backward in two passes asks twice.
    """
    if mode != "selective" or not splits_backward(settings):
        return None
    name = settings.pipeline_parallel_schedule_csv or settings.pipeline_parallel_schedule
    return (
        f"schedule {name} computes backward in two passes and selective checkpointing allows one: use "
        "--activation_checkpoint.mode full or none"
    )


def splits_backward(settings: Parallelism) -> bool:
    """Whether a block's graph is walked twice, for its input and for its weights (zero bubble, arXiv:2401.10241)."""
    if settings.pipeline_parallel_degree == 1:
        return False
    if settings.pipeline_parallel_schedule_csv is None:
        return settings.pipeline_parallel_schedule in ZERO_BUBBLE
    try:
        return read_schedule(settings.pipeline_parallel_schedule_csv).in_two_parts
    except UserError:  # said by `pipeline_problems`
        return False
