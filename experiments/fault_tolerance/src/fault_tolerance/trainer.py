"""The run of this experiment: replica groups that may be lost, and come back, while it goes on."""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.errors import UserError
from core.runtime.launcher import World, find_world
from core.step.checks import check_run
from core.step.loss import Loss
from core.step.rows_ahead import RowsAhead
from core.step.update import StepInfo
from core.train.exchange import Exchange
from core.train.folder import config_text
from core.train.profile import Profiler
from core.train.trainer import Trainer
from fault_tolerance.folder import finished_step, group_folder, leave_word, set_aside
from fault_tolerance.objective import GroupObjective
from fault_tolerance.outer import OuterStep
from fault_tolerance.replicas import NotCommitted, Replicas
from fault_tolerance.rows import DealtRows, over_groups
from fault_tolerance.state import RunState

log = logging.getLogger("armature")


class RunIsOver(Exception):
    """Other groups have finished the run."""


class FaultTolerantTrainer(Trainer):
    """A training run of replica groups, each a copy of the weights on ranks of its own: one that is lost costs speed
    and changes nothing else, and takes over the state of the others when it comes back."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        fault_tolerance: Replicas.Config = field(default_factory=Replicas.Config)
        """The groups, where they meet, and how they work together."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            yield from refused(self)

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Trainer

    def __init__(self, config: Config) -> None:
        n_ranks = (find_world() or World()).size
        check_run(config, n_ranks)
        n_data = config.parallelism.degrees(n_ranks).data
        config.training = over_groups(config.training, n_data, config.fault_tolerance.n_groups)
        if config.fault_tolerance.n_groups > 1 and config.dump_folder is not None:
            config.dump_folder = group_folder(config.dump_folder, config.fault_tolerance.group)
            set_aside(Path(config.dump_folder), config.checkpoint)
        super().__init__(config)

    @staticmethod
    def plan(config: Any, *, world_size: int | None, rank: int) -> Any:
        from fault_tolerance.plan import plan  # loads much that a run does without

        return plan(config, world_size=world_size, rank=rank)

    def make_objective(self, loss: Loss, **settings: Any) -> GroupObjective:
        return GroupObjective(self.built.models, loss, optimizer=self.optimizer, **settings)

    def _start_model(self) -> None:
        if self.loader.in_order:
            raise UserError(
                f"{self.loader.description}: rows that are read in order cannot be dealt out to a changing number of "
                "replica groups: prepare them with python -m core.data.prepare"
            )
        super()._start_model()
        self.own_validator, names = self.validator, ("n_rows", "local_batch_size")
        sizes = dict(zip(names, (self.rows_per_step, self.config.training.local_batch_size), strict=True))
        first_row = self.checkpoints.first_row
        self.dealt = DealtRows(self.loader, self.layout, first_row, last_step=self.last_step, **sizes)
        rows: RowsAhead = self.dealt
        self.rows = self.report.rows = rows

    def _loop(self, exchange: Exchange, profiler: Profiler) -> int:
        settings = json.loads(config_text(self.config, self.device))
        state = RunState(self.checkpoints, self.built, self.optimizer, self.layout, settings=settings)
        live = {"state": state, "layout": self.layout, "ranks": self.checkpoints.ranks}
        self.replicas = self.config.fault_tolerance.build(**live)
        self.outer = None if self.config.fault_tolerance.method == "every_step" else OuterStep(self.replicas)
        self._between_rounds = True
        try:
            return super()._loop(exchange, profiler)
        except RunIsOver:
            self.rows.close()
            exchange.cause = "the other replica groups, which finished the run,"
            return state.step
        finally:
            self.replicas.close()

    def step(self, step: int) -> StepInfo:
        """Train until a step counts that is `step`, or a later one where others were ahead."""
        target = step
        while True:
            if self._between_rounds:
                step = self._begin()
                target = max(target, step)
            try:
                info = self._attempt(step)
            except NotCommitted:
                self._between_rounds = True
                log.info(f"step {step:,} is done again: not all replica groups finished it")
                continue
            if step >= target:
                return info
            step += 1

    def _begin(self) -> int:
        """Meet the other groups; returns the number of the next step. Raises `RunIsOver` where there is none."""
        self.replicas.begin()
        done = self.replicas.state.step
        if max(done, self._finished()) >= self.last_step:
            raise RunIsOver
        self.dealt.deal(self.replicas.number, self.replicas.n)
        self.validator = self.own_validator if self.replicas.leads else None
        self.checkpoints.saves = self.replicas.leads
        if self.outer is not None:
            self.outer.begin_round()
        return done + 1

    def _attempt(self, step: int) -> StepInfo:
        """One attempt at a step, of all groups together or of this one's part of a round."""
        assert isinstance(self.objective, GroupObjective)
        ends = step == self.last_step or step % self.config.fault_tolerance.steps_per_round == 0
        self._between_rounds = ends
        with self.objective.shared(self.replicas, step) if self.outer is None else nullcontext():
            info = super().step(step)
        if ends and self.outer is not None:
            self.outer(step)
        if step == self.last_step:
            self._finish()
        return info

    def _finish(self) -> None:
        """Hand the last state to groups that are behind, and leave word for those that come when all have gone."""
        self.replicas.begin(least=1)
        if self.config.fault_tolerance.n_groups > 1 and self.replicas.leads:
            self.checkpoints.ranks.first(lambda: leave_word(self.folder, self.last_step))

    def _finished(self) -> int:
        """The last step of the run where other groups have finished it; else 0. A collective of the group."""
        if self.config.fault_tolerance.n_groups == 1:
            return 0
        return self.checkpoints.ranks.first(lambda: finished_step(self.folder))


def refused(config: FaultTolerantTrainer.Config) -> Iterator[tuple[str, str]]:
    """What replica groups do not work with, and why."""
    groups, parallelism = config.fault_tolerance, config.parallelism
    if parallelism.pipeline_parallel_degree > 1:
        yield (
            "parallelism.pipeline_parallel_degree",
            f"pipeline_parallel_degree {parallelism.pipeline_parallel_degree}: a pipeline runs a fixed number of "
            "microbatches, and a group has more when another is lost: use 1",
        )
    if parallelism.cpu_offload:
        yield "parallelism.cpu_offload", "gradients are summed over groups on the device: unset cpu_offload"
    if config.optimizer.in_backward:
        yield (
            "optimizer.in_backward",
            "a step counts when the gradients of all groups have arrived, after backward: unset in_backward",
        )
    if groups.n_groups > 1 and config.dump_folder is None:
        yield "dump_folder", "the groups of a run share a folder: name it with --dump_folder"
    if groups.method != "every_step":
        yield from round_problems(config, groups)


def round_problems(config: FaultTolerantTrainer.Config, groups: Replicas.Config) -> Iterator[tuple[str, str]]:
    """What does not fit rounds of steps, between which alone all groups are equal."""
    interval, sync = config.checkpoint.interval, groups.sync_steps
    if config.checkpoint.saves and interval % sync:
        yield (
            "checkpoint.interval",
            f"interval {interval} must be a multiple of fault_tolerance.sync_steps {sync}: groups are equal between "
            f"rounds alone; use {interval // sync * sync or sync}",
        )
    rows, training = groups.n_groups * config.training.local_batch_size, config.training
    if training.global_batch_size != -1 and training.global_batch_size < rows:
        yield (
            "training.global_batch_size",
            f"global_batch_size {training.global_batch_size} must be at least n_groups {groups.n_groups} x "
            f"local_batch_size {training.local_batch_size} = {rows}: under {groups.method} each group needs rows",
        )
