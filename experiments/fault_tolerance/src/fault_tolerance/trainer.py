"""The run of this experiment: replica groups that may be lost, and come back, while it goes on."""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
from fault_tolerance.folder import group_folder, is_finished, leave_word, set_aside
from fault_tolerance.objective import GroupObjective
from fault_tolerance.outer import OuterStep
from fault_tolerance.replicas import NotCommitted, Replicas
from fault_tolerance.rows import DealtRows, over_groups
from fault_tolerance.state import RunState

log = logging.getLogger("armature")


class RunIsOver(Exception):
    """Nothing is left to train for this group: others finished the run, or it was asked to stop while it waited."""


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
        groups, folder = config.fault_tolerance, config.dump_folder
        if groups.n_groups > 1 and folder is not None:
            folder = group_folder(folder, groups.group)
            set_aside(Path(folder), config.checkpoint)
        training = over_groups(config.training, n_data, groups.n_groups)
        super().__init__(replace(config, training=training, dump_folder=folder))
        self.settings = json.loads(config_text(self.config, self.device))
        if self.is_over and self.checkpoints.start.step == self.last_step:
            self._leave_word()

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
        self.exchange = exchange
        if self._is_finished():
            return self._leave(self.checkpoints.start.step)
        state = RunState(self.checkpoints, self.built, self.optimizer, self.layout, settings=self.settings)
        live = {"state": state, "layout": self.layout, "ranks": self.checkpoints.ranks}
        self.replicas = self.config.fault_tolerance.build(**live)
        self.outer = None if self.config.fault_tolerance.method == "every_step" else OuterStep(self.replicas)
        self._between_rounds = True
        try:
            try:
                step, saved = super()._loop(exchange, profiler), self.checkpoints.saves
            except RunIsOver:
                step, saved = self._leave(state.step), False
            if step == self.last_step:
                self._end(saved=saved)
            return step
        finally:
            self.replicas.close()

    def _leave(self, step: int) -> int:
        """The end of a group that trains no further; returns `step`, which a request to stop has saved."""
        self.rows.close()
        if not self.exchange.stopping:
            self.exchange.cause = f"the other replica groups, which finished the run in {self.folder.parent},"
        elif step > self.checkpoints.start.step and not self.checkpoints.saver.due(step, last=False):
            self._save(step, last=False)
        self.checkpoints.finish()
        return step

    def _end(self, *, saved: bool) -> None:
        """See that the last step is saved: by the first of the groups that are there, which leaves word of it. The
        others wait for that, and take its place when it is lost."""
        while self.config.fault_tolerance.n_groups > 1 and not self._is_finished():
            if self.replicas.leads:
                self.checkpoints.saves = True
                if not saved:
                    self._save(self.last_step, last=True)
                self._leave_word()
            else:
                self.replicas.begin(least=1)

    def _save(self, step: int, *, last: bool) -> None:
        self.checkpoints.after_step(step, last=last, stopping=True, asked=False, validation_loss=None)

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
        self.replicas.begin(look=self._look)
        done = self.replicas.state.step
        if done >= self.last_step or self._is_finished():
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
        return info

    def _look(self) -> None:
        """Raise `RunIsOver` where a group that waits for others need not wait. A collective of the group."""
        if self._is_finished() or self.exchange():
            raise RunIsOver

    def _is_finished(self) -> bool:
        """Whether groups have finished the run. A collective of the group. Raises `UserError` where what they finished
        in its folder is a run of other settings."""
        if self.config.fault_tolerance.n_groups == 1:
            return False
        return self.checkpoints.ranks.first(lambda: is_finished(self.folder, self.last_step, self.settings))

    def _leave_word(self) -> None:
        if self.config.fault_tolerance.n_groups > 1:
            self.checkpoints.ranks.first(lambda: leave_word(self.folder, self.last_step, self.settings))


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
    if groups.n_groups > 1:
        yield from shared_problems(config, groups)
    if groups.method != "every_step":
        yield from round_problems(config, groups)


def shared_problems(config: FaultTolerantTrainer.Config, groups: Replicas.Config) -> Iterator[tuple[str, str]]:
    """What several groups would write to one place, and how long their ranks must wait for one another."""
    folder, patience = config.checkpoint.folder, config.comm.train_timeout_seconds
    if config.checkpoint.enable and ("://" in folder or Path(folder).is_absolute() or ".." in Path(folder).parts):
        yield (
            "checkpoint.folder",
            f"folder {folder} would be that of all {groups.n_groups} groups: name one below the run's, as checkpoint",
        )
    if patience <= groups.timeout_s:
        yield (
            "fault_tolerance.timeout_s",
            f"timeout_s {groups.timeout_s} must be less than comm.train_timeout_seconds {patience}, which ends a group "
            "while one of its ranks still waits for another group",
        )


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
