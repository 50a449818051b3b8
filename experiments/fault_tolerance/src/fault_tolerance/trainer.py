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
from core.train.state import model_tensors
from core.train.trainer import Trainer
from fault_tolerance.checks import refused
from fault_tolerance.errors import NoQuorum, NotCommitted, RunIsOver
from fault_tolerance.folder import group_folder, is_finished, leave_word, set_aside
from fault_tolerance.objective import GroupObjective
from fault_tolerance.outer import OuterStep, outer_momentum
from fault_tolerance.replicas import Replicas, Words
from fault_tolerance.rows import DealtRows, over_groups
from fault_tolerance.state import RunState

log = logging.getLogger("armature")


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
        if self.config.fault_tolerance.method == "diloco":
            self.checkpoints.further = outer_momentum(model_tensors(self.built.models))
        self.own_validator, names = self.validator, ("n_rows", "local_batch_size")
        sizes = dict(zip(names, (self.rows_per_step, self.config.training.local_batch_size), strict=True))
        first_row = self.checkpoints.first_row
        self.dealt = DealtRows(self.loader, self.layout, first_row, last_step=self.last_step, **sizes)
        rows: RowsAhead = self.dealt
        self.rows = self.report.rows = rows

    def _loop(self, exchange: Exchange, profiler: Profiler) -> int:
        self.exchange = exchange
        if self._is_finished():
            self._leave(self._others())
            return self.checkpoints.start.step
        state = RunState(self.checkpoints, self.built, self.optimizer, self.layout, settings=self.settings)
        live = {"state": state, "layout": self.layout, "ranks": self.checkpoints.ranks}
        self.replicas = self.config.fault_tolerance.build(**live)
        self.outer = None if self.config.fault_tolerance.method == "every_step" else OuterStep(self.replicas)
        self._between_rounds = True
        try:
            try:
                step = super()._loop(exchange, profiler)
            except RunIsOver as over:
                self._leave(str(over))
                step = state.step
            if not self._between_rounds:
                step = self._undo_round()
            if step == self.last_step:
                self._end()
            elif self.layout.sums(float(bool(self.observers.cause)))[0] and self.config.fault_tolerance.n_groups > 1:
                self.replicas.begin(least=1, words=Words(stop=True))
            return step
        finally:
            self.replicas.close()

    def _leave(self, cause: str) -> None:
        """The end of a group that trains no further, for this cause; a request to stop saves it."""
        self.rows.close()
        if self.exchange.stopping:
            self._keep(saves=self.replicas.leads)
        else:
            self.exchange.cause = cause
        self.checkpoints.finish()

    def _undo_round(self) -> int:
        """Go back to the beginning of the round in which the group was asked to stop, which others take again; returns
        the step before it, saved."""
        assert self.outer is not None
        self.outer.undo()
        self._keep(saves=self.replicas.leads)
        self.checkpoints.finish()
        log.info(f"the round was left after step {self.replicas.state.step:,}, and is to be taken again")
        return self.replicas.state.step

    def _keep(self, *, saves: bool) -> None:
        """Save the last step that counts, where this group `saves` and has not saved it."""
        step, self.checkpoints.saves = self.replicas.state.step, saves
        if step > self.checkpoints.start.step and step != self.checkpoints.saved_step:
            self._save(step, last=False)

    def _end(self) -> None:
        """See that the last step is saved: by the first of the groups that are there, which leaves word of it. The
        others wait for that, and take its place when it is lost."""
        while self.config.fault_tolerance.n_groups > 1 and not self._is_finished():
            if self.replicas.leads:
                self.checkpoints.saves = True
                if self.checkpoints.saved_step != self.last_step:
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
        checkpoints, replicas = self.checkpoints, self.replicas
        try:
            replicas.begin(look=self._look, words=Words(save=checkpoints.owed))
        except NoQuorum:
            self._keep(saves=True)  # each in its own folder: which of them is the first is not known any more
            checkpoints.finish()
            raise
        done = replicas.state.step
        if replicas.heard.stop:
            raise RunIsOver("an observer of another replica group")
        if done >= self.last_step or self._is_finished():
            raise RunIsOver(self._others())
        if checkpoints.owed and not replicas.leads:
            log.info("the replica group that saves was asked for a checkpoint")
        checkpoints.owed = replicas.heard.save and replicas.leads
        self.dealt.deal(replicas.number, replicas.n)
        if self.outer is not None:
            self.outer.begin_round()
        return done + 1

    def _others(self) -> str:
        return f"the other replica groups, which finished the run in {self.folder.parent},"

    def _attempt(self, step: int) -> StepInfo:
        """One attempt at a step, of all groups together or of this one's part of a round."""
        assert isinstance(self.objective, GroupObjective)
        ends = step == self.last_step or step % self.config.fault_tolerance.steps_per_round == 0
        self._between_rounds = ends
        whole = ends and self.replicas.leads
        self.validator, self.checkpoints.saves = self.own_validator if whole else None, whole
        with self.objective.shared(self.replicas, step) if self.outer is None else nullcontext():
            info = super().step(step)
        if ends and self.outer is not None:
            self.outer(step)
        return info

    def _look(self) -> None:
        """Raise `RunIsOver` where a group that waits for others need not wait. A collective of the group."""
        if self._is_finished() or self.exchange():
            raise RunIsOver(self._others())

    def _is_finished(self) -> bool:
        """Whether groups have finished the run. A collective of the group. Raises `UserError` where what they finished
        in its folder is a run of other settings."""
        if self.config.fault_tolerance.n_groups == 1:
            return False
        return self.checkpoints.ranks.first(lambda: is_finished(self.folder, self.last_step, self.settings))

    def _leave_word(self) -> None:
        if self.config.fault_tolerance.n_groups > 1:
            self.checkpoints.ranks.first(lambda: leave_word(self.folder, self.last_step, self.settings))
