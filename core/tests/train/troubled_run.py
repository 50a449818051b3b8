"""A run of the toy model in which something happens to one rank: a program of its own, for launchers."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from toy_run import toy_run

from core.config.cli import main
from core.config.derive import derive
from core.config.errors import UserError
from core.config.record import to_json
from core.data.corpus import Corpus
from core.step.update import StepInfo
from core.train.trainer import Trainer


class Troubled(Trainer):
    """A run with trouble in front of a step, on one rank, in the first attempt."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        trouble: str = "none"
        """none, raise, mistake, exit, hang, or a signal that the rank sends itself."""
        trouble_rank: int = 1
        trouble_step: int = 3
        pause_s: float = 0.0
        """How long every step waits before it begins."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Trainer

    def step(self, step: int) -> StepInfo:
        c = self.config
        time.sleep(c.pause_s)
        first = not list(self.folder.glob("metrics.attempt-*"))
        if first and (self.world.rank, step) == (c.trouble_rank, c.trouble_step):
            self._trouble(c.trouble)
        return super().step(step)

    def _trouble(self, kind: str) -> None:
        if kind == "raise":
            raise RuntimeError("the disk is on fire")
        if kind == "mistake":
            raise UserError("the disk is full: buy another")
        if kind == "exit":
            sys.exit()
        if kind == "hang":
            time.sleep(10_000)
        if kind != "none":
            os.kill(os.getpid(), signal.Signals[kind])


def troubled_run(folder: Path, name: str, **trouble: object) -> Path:
    """The file of a run in `folder`/`name` of six steps, four rows each, with a validation in the middle."""
    run = toy_run(folder, steps=6)
    run.dump_folder = str(folder / name)
    run.training.local_batch_size, run.training.global_batch_size = 2, 4
    run.validator.enable, run.validator.freq = True, 3
    config = derive(run, Troubled.Config, **trouble)
    file = folder / f"{name}.json"
    file.write_text(to_json(config))
    return file


def say_who_tokenises() -> None:
    """From here on, who tokenises a corpus in this process says so."""
    quietly = Corpus._prepare

    def prepare(corpus: Corpus, *args: object) -> object:
        print("tokenises here", flush=True)
        return quietly(corpus, *args)

    Corpus._prepare = prepare


if __name__ == "__main__":
    main(sys.modules[__name__])
