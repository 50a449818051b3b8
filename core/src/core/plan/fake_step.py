"""One rank's step on fake tensors, in a process group of ranks that are not there.

Few blocks and microbatches are run, and all are counted. N ranks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup

from core.activation_checkpoint.meter import Meter
from core.comm.all_to_all import AllToAll
from core.data.packing import Batch
from core.nn.balance import routers
from core.nn.init import materialise
from core.optim.optimizer import Optimizer
from core.optim.weight import local_bytes
from core.parallel.fake import fake_ranks
from core.parallel.layout import RankView, SingleRank, Wrapping
from core.parallel.many_ranks import ManyRanks
from core.plan.passes import Passes, passes_of
from core.plan.pipeline_passes import Action
from core.plan.sample_blocks import RestingBytes, SampledModel, every_weight, resting_bytes, sampled_models
from core.plan.segments import MessageKind, Recorder, Segment, expand
from core.plan.shared_matrices import SharedMatrices
from core.plan.traffic import axes
from core.step.checks import Run
from core.step.objective import Objective, valid_tokens
from core.step.source_losses import Tally
from core.step.update import train_step

_CPU = torch.device("cpu")
PASSES = {
    "F": "head and loss",
    "B": "backward",
    "I": "backward of inputs",
    "W": "backward of weights",
    "RECV_F": "receiving activations",
    "RECV_B": "receiving gradients",
    "WAIT_SEND_F": "letting go of activations",
    "WAIT_SEND_B": "letting go of gradients",
    "UNSHARD": "gathering weights",
    "RESHARD": "letting go of weights",
    "REDUCE_GRAD": "summing gradients",
}
"""What the end of a pass does, behind the last block."""


@dataclass(kw_only=True)
class StepRecord:
    """A rank's part of a run."""

    blocks: list[list[int]]
    """The blocks of each of its stages; without a pipeline there is one."""
    n_microbatches: int
    stored: RestingBytes
    inputs: int
    """Bytes of a microbatch, and of what a pipeline receives tensors in."""
    segments: list[Segment]
    """Its step."""


def run_fake_step(run: Run, *, world_size: int, rank: int, device: torch.device) -> StepRecord:
    """A step of `run` on `rank` of `world_size`, in the types of a run on `device`, computed here and in no memory.

    It is any step but the first, whose traces stay: the optimizer's state, what is learned once. Experts get equally
    many rows.
    """
    training, activation_checkpoint = run.training, run.activation_checkpoint
    if activation_checkpoint.mode == "memory_budget":  # the compiler's choice, and nothing is compiled
        activation_checkpoint = replace(activation_checkpoint, mode="none")
    parallelism = replace(run.parallelism, enable_async_tensor_parallel=False)  # the compiler's work, too
    dtype = training.compute_dtype(device)
    with nullcontext() if world_size == 1 else fake_ranks(world_size, rank):
        layout: RankView = SingleRank(_CPU) if world_size == 1 else ManyRanks(parallelism, _CPU)
        checkpoint = activation_checkpoint.build(folder=Path()).apply
        wrapping = Wrapping(compute_dtype=dtype, checkpoint=checkpoint, dispatcher=evenly)
        spread = {"groups": run.optimizer.groups, "converters": run.converters}
        sampled = sampled_models(run.model, layout, activation_checkpoint, wrapping, **spread, device=device)
        models = {number: part.model for number, part in sampled.items()}
        with FakeTensorMode(allow_non_fake_inputs=True):
            for model in models.values():
                materialise(model, _CPU, getattr(torch, training.dtype))
            every = every_weight(sampled)
            matrices = SharedMatrices(layout)
            optimizer = run.optimizer.build(weights=[weight for weight, _ in every.values()], layout=matrices)
            objective = Objective(
                list(models.values()),
                run.loss.build(),
                layout=layout,
                dtype=dtype,
                mask=training.mask_of(run.dataloader),
            )
            with Meter() as entering:
                passes = passes_of(training, layout, models, objective, run.dataloader.inputs)
            copies = [(weight.value, source) for weight, source in every.values() if weight.value is not source]
            fake = FakeObjective(layout, list(sampled.values()), passes, optimizer, matrices, copies)
            fake.step({None, passes.n_microbatches - 1}, updates=False)  # makes what is made once
            fake.step(microbatches_of_interest(passes.order), updates=True)
            kept = resting_bytes(sampled, optimizer)
            return StepRecord(
                blocks=[sorted(part.stand_in) for part in sampled.values()],
                n_microbatches=passes.n_microbatches,
                stored=kept,
                inputs=entering.alive,
                segments=fake.segments(),
            )


def evenly(group: ProcessGroup) -> AllToAll:
    """A dispatcher that sends equally many rows to every rank: on fake tensors nobody can count them."""

    def splits(_: Tensor, n_rows: int) -> list[list[int]]:
        each, more = divmod(n_rows, group.size())
        return [[each + (i < more) for i in range(group.size())], [each + (group.rank() < more)] * group.size()]

    return AllToAll(group, splits)


class FakeObjective:
    """Takes the place of an `Objective` in `train_step`, and cuts the last step into segments."""

    def __init__(
        self,
        layout: RankView,
        sampled_models: list[SampledModel],
        passes: Passes,
        optimizer: Optimizer,
        matrices: SharedMatrices,
        copies: list[tuple[nn.Parameter, nn.Parameter]],
    ) -> None:
        """`copies` are weights of blocks that are not there, each with the weight whose gradient stands for its own."""
        self.layout, self.passes, self.optimizer, self.copies = layout, passes, optimizer, copies
        self.matrices = matrices
        self.models = [part.model for part in sampled_models]
        self.axes = group_axes(layout, experts=any(routers(model) for model in self.models))
        self.stand_in = {i: other for part in sampled_models for i, other in part.stand_in.items()}
        blocks = {name: block for model in self.models for name, block in model.layers.items()}
        self.stages = self.models + [blocks[str(other)] for i, other in self.stand_in.items() if other != i]
        """The models, and a block again for each block that it stands for: all whose experts count tokens."""

    def step(self, few: set[int | None], *, updates: bool) -> None:
        """Run a step of `few` microbatches, with the update or without it; the batch that is counted is not the one
        that is computed."""
        self.few, self.updates = few, updates
        zeros_BL = torch.zeros(1, 1, dtype=torch.int64)
        counted = Batch(zeros_BL, zeros_BL, zeros_BL, zeros_BL)
        settings: dict[str, Any] = {"step": 1, "lr_factor": 0.0, "max_norm": 1.0, "on_nonfinite": "stop"}
        self.recorded: dict[tuple[str, int], list[list[Segment]]] = defaultdict(list)
        self.optimizer.zero_grad()
        with Recorder(self.axes, self._gradients) as self.recorder, self.recorder.listening(self.models):
            self.matrices.recorder = self.recorder
            train_step(cast(Objective, self), self.optimizer, [counted], **settings)
            self.update = self.recorder.end("update")

    def tallies(self, sources: None) -> list[Tally]:
        """Nothing: what rows come from costs nothing."""
        del sources
        return []

    def n_valid(self, batches: Sequence[Batch]) -> float:
        """As an `Objective` does."""
        return self.layout.sum_of_data(valid_tokens(batches))

    def accumulate(self, batches: Sequence[Batch], n_valid: float, tallies: Sequence[Tally]) -> tuple[float, float]:
        """As an `Objective` does, with the microbatch of the passes."""
        del batches, n_valid, tallies
        self.start = self.recorder.end("start of the step")
        for action in self.passes.order:
            if action.microbatch in self.few:
                if n_sent := self.passes.run(action):
                    self.recorder.note(MessageKind("pipeline", "send"), n_sent)
                self.recorded[action[:2]].append(self.recorder.end(PASSES[action.kind]))
        self.passes.end()
        for copy, source in self.copies:
            copy.grad = source.grad
        if not self.updates:
            self.optimizer.zero_grad()
        return 0.0, 0.0

    def segments(self) -> list[Segment]:
        """The segments of the whole step."""
        passes = [segment for recorded in self._all_passes() for segment in expand(recorded, self.stand_in)]
        return [*self.start, *passes, *self.update]

    def _all_passes(self) -> Iterator[list[Segment]]:
        """For each action of the step the pass that was recorded for it, or that stands for it."""
        n = Counter(action[:2] for action in self.passes.order)
        done: Counter[tuple[str, int]] = Counter()
        for action in self.passes.order:
            kind = action[:2]
            yield recorded_pass(self.recorded[kind], done[kind], n[kind])
            done[kind] += 1

    @torch.no_grad()
    def _gradients(self) -> int:
        return sum(local_bytes(weight.grad) for model in self.models for weight in model.parameters())


def recorded_pass(recorded: list[list[Segment]], place: int, n: int) -> list[Segment]:
    """Of `n` passes of a kind the one at `place` if all are recorded; else the first, the last, or the second for all
    between."""
    if len(recorded) == n:
        return recorded[place]
    return recorded[0 if place == 0 else -1 if place == n - 1 else min(1, len(recorded) - 1)]


def microbatches_of_interest(order: Sequence[Action]) -> set[int | None]:
    """The microbatches that are run: of each kind of action the first three, so that the second is in the midst of
    others, and the last. None is for actions that concern none."""
    by_kind: dict[tuple[str, int], list[int | None]] = defaultdict(list)
    for action in order:
        by_kind[action[:2]].append(action.microbatch)
    return {i for found in by_kind.values() for i in (*found[:3], found[-1])}


def group_axes(layout: RankView, *, experts: bool) -> Mapping[str, str]:
    """The axis of every process group by its name; the group of all ranks is "all"."""
    if not isinstance(layout, ManyRanks):
        return {}
    everyone = dist.group.WORLD
    assert everyone is not None
    groups = {layout.stage_group.group_name: "stage", everyone.group_name: "all"}
    return groups | axes(layout.views, experts=experts)
