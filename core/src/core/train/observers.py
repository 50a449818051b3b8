"""Observers: what a user wants to record of a run, or to stop it for, in a file outside of core."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from core.config.configurable import Configurable, owner_of
from core.config.errors import UserError
from core.data.tokenizer import Tokenizer
from core.step.objective import Objective
from core.step.update import StepInfo
from core.train.metrics import Record

log = logging.getLogger("armature")

OWN_NAMES = {each.name for each in fields(Record)}
"""What a record has by itself."""


class Observer(Configurable, ABC):
    """Is called after every step of a run with what the step did; may return numbers for the record, and ask to stop.

    Every rank has its own and calls it after the same steps with the same `StepInfo`. The record has the numbers of the
    first rank; a stop that any rank asks for is agreed on before the next step, so that all ranks make the same steps.
    An error of one ends the run on all.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        console: bool = False
        """Also show its numbers in the lines of steps on the console."""

    def __init__(self, config: Config, *, folder: Path, rank: int) -> None:
        """`folder` is the run's, `rank` the number of this process; rank 0 is the first."""
        self.config, self.folder, self.rank = config, folder, rank
        self.state: dict[str, float] = {}
        """What it has to remember, by names of its own: checkpoints keep that of the first rank, and it is here again
        before the first step of a run that goes on."""
        self.stop_reason = ""
        """Why the run is to stop; empty while it goes on."""

    def begin(self, objective: Objective, tokenizer: Tokenizer) -> None:
        """Hear, once before the first step, of the model: `objective.stages` are its parts on this rank, which are in
        training mode between the steps, in `objective.layout`."""

    @abstractmethod
    def after_step(self, info: StepInfo) -> Mapping[str, float] | None:
        """Numbers for the record, by name. A record has the last number of each name since the record before it; one
        that is not finite is null there."""

    def stop(self, reason: str) -> None:
        """Ask to stop after this step, with a sentence that says why; the run is saved as at a signal."""
        self.stop_reason = reason


@dataclass
class Observers:
    """The observers of a run on this rank, in the order of the configuration."""

    named: dict[str, Observer]
    """Each by its place and class, `0 Perplexity`."""
    _numbers: dict[str, float] = field(default_factory=dict)
    _sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def built(cls, configs: Sequence[Observer.Config], **live: Any) -> "Observers":
        """Those of these configurations; `live` is what an observer is built with."""
        names = [f"{place} {getattr(owner_of(type(c)), '__name__', '')}" for place, c in enumerate(configs)]
        return cls({name: config.build(**live) for name, config in zip(names, configs, strict=True)})

    def begin(self, objective: Objective, tokenizer: Tokenizer) -> None:
        """Have each hear of the model."""
        for observer in self.named.values():
            observer.begin(objective, tokenizer)

    def __call__(self, info: StepInfo) -> None:
        """Have each see a step. Raises `UserError` for what one returns that no record can have."""
        for name, observer in self.named.items():
            was_stopping = bool(observer.stop_reason)
            found = observer.after_step(info)
            if found is not None and not isinstance(found, Mapping):
                raise UserError(f"observer {name} returned a {type(found).__name__}: return a dict of numbers, or None")
            for key, value in (found or {}).items():
                self._check(name, key, value)
                self._numbers[key] = float(value)
            if observer.stop_reason and not was_stopping:
                log.info(f"observer {name}: {observer.stop_reason}: stopping after this step")

    def _check(self, name: str, key: Any, value: Any) -> None:
        if not isinstance(key, str) or not key:
            raise UserError(f"observer {name} returned a number called {key!r}: its name must be a text")
        if key in OWN_NAMES:
            raise UserError(f"observer {name} returned the number {key}, which is a field of the record: rename it")
        if (other := self._sources.setdefault(key, name)) != name:
            raise UserError(f"observers {other} and {name} both returned the number {key}: rename one of the two")
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = ": return .item() of it" if hasattr(value, "item") else ""
            raise UserError(f"observer {name} returned {key} as a {type(value).__name__}, which is no number{hint}")

    def take(self) -> dict[str, float]:
        """The last number of each name since this was called before."""
        numbers, self._numbers = self._numbers, {}
        return numbers

    def on_console(self, key: str) -> bool:
        """Whether the number of this name is shown in the lines of steps."""
        return key in self._sources and self.named[self._sources[key]].config.console

    @property
    def cause(self) -> str:
        """Which observer asked to stop, and why; empty where none did."""
        asked = ((name, each.stop_reason) for name, each in self.named.items() if each.stop_reason)
        return next((f"observer {name} ({reason})" for name, reason in asked), "")

    def state(self) -> dict[str, dict[str, float]]:
        """What each remembers; those that remember nothing are left out."""
        return {name: dict(each.state) for name, each in self.named.items() if each.state}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Give each what it remembered when a checkpoint was saved. One at another place, or of another class, begins
        anew, and a line says so."""
        for name, numbers in state.items():
            if name in self.named:
                self.named[name].state.update(numbers)
            else:
                log.info(f"observer {name} is not in this run: what it remembered is left in the checkpoint")
