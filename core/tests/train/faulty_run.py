"""A run of the toy model that is saved every second step, and in which one thing goes wrong: a program of its own, and
how its ranks are started, watched and ended."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOSPC
from itertools import count
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from rank_life import live, torchrun_environ
from toy_run import toy_run

from core.checkpoint.storage import NewFile, Storage
from core.config.cli import main
from core.config.record import to_json
from core.step.update import StepInfo
from core.testing.ranks import PRELOAD
from core.train.trainer import Trainer

LIMIT_S = 60.0
N_STEPS = 6


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank: in its writing of a step, or, for a signal that it sends itself, in front of it."""

    kind: str
    """full, crash, hang, lie, or the name of a signal."""
    rank: int = 0
    step: int = 4
    once: str = ""
    """File that says that it went wrong already, and is not to again."""


class Disk:
    """A stream that asks before each write; `before` may write some of it, and end there."""

    def __init__(self, stream: Any, before: Callable[[Any, Any], None]) -> None:
        self.stream, self.before = stream, before

    def write(self, data: Any) -> None:
        self.before(self.stream, data)
        self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def write_half(stream: Any, data: Any) -> None:
    """Leave the first half of the data in the file."""
    stream.write(data[: len(data) // 2])
    stream.flush()


def ask(before: Callable[[Any, Any], None], chosen: Callable[[str], bool]) -> None:
    """From here on the chosen files of checkpoints are written to a disk that asks."""
    create = Storage.create

    @contextmanager
    def create_so(storage: Storage, name: str) -> Iterator[NewFile]:
        with create(storage, name) as file:
            if chosen(name):
                file.stream = Disk(file.stream, before)  # pyrefly: ignore[bad-assignment] - as much as is used
            yield file

    Storage.create = create_so  # pyrefly: ignore[bad-assignment] - the same in all but its name


def apply_fault(fault: Fault) -> None:
    """From here on that goes wrong in this process."""

    def before(stream: Any, data: Any) -> None:
        if len(data) < 1000:
            return
        if fault.kind == "lie":
            stream.write(b"1")
            return
        write_half(stream, data)
        if fault.kind == "full":
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        if fault.kind == "crash":
            raise RuntimeError("the writer stumbled")
        time.sleep(1000)

    def step(trainer: Trainer, step: int) -> StepInfo:
        if (trainer.world.rank, step) == (fault.rank, fault.step) and not (fault.once and Path(fault.once).exists()):
            Path(fault.once or os.devnull).touch()
            os.kill(os.getpid(), signal.Signals[fault.kind])
        return undisturbed(trainer, step)

    if fault.kind.startswith("SIG"):
        undisturbed, Trainer.step = Trainer.step, step
    else:
        written = f"step-{fault.step}.tmp/rank-{fault.rank:05}.safetensors"
        ask(before, lambda name: name == written)


SYSTEM_CALLS = ("mkdir", "unlink", "rmdir", "rename", "fsync")


def kill_at(moment: int) -> None:
    """End this process in front of its system call of that number, or, where that is a write, in the middle of it."""
    calls = count(1)

    def before(stream: Any = None, data: Any = None) -> None:
        if next(calls) == moment:
            if stream is not None:
                write_half(stream, data)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            before()
            return call(*args, **kwargs)

        return called

    for name in SYSTEM_CALLS:
        setattr(os, name, watched(getattr(os, name)))
    ask(before, lambda name: True)


def saved_run(folder: Path, name: str = "run", *, n_steps: int = N_STEPS) -> Trainer.Config:
    """A run in `folder`/`name` of four rows a step, with a checkpoint every second one."""
    run = toy_run(folder, steps=n_steps)
    run.dump_folder = str(folder / name)
    run.training.local_batch_size, run.training.global_batch_size = 2, 4
    run.validator.enable = False
    run.checkpoint.enable, run.checkpoint.interval = True, 2
    return run


@dataclass(frozen=True)
class Ended:
    """How the ranks of a launch ended, and what each printed."""

    codes: list[int | None]
    texts: list[str]


class Launched:
    """A run in processes of its own: one that nobody launched, or two ranks."""

    def __init__(self, run: Trainer.Config, *words: str, n_ranks: int = 1, fault: Fault | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        assert run.dump_folder is not None
        self.folder = Path(run.dump_folder)
        file = self.folder.with_suffix(".json")
        file.write_text(to_json(run))
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.outputs = [self.folder.with_suffix(f".rank-{rank}.txt") for rank in range(n_ranks)]
        for output in self.outputs:
            output.unlink(missing_ok=True)
        port = self._store.port
        environs = [torchrun_environ(rank, n_ranks, port) if n_ranks > 1 else {} for rank in range(n_ranks)]
        self.processes = [
            context.Process(target=become_rank, args=(["--config", str(file), *words], environ, output, fault))
            for environ, output in zip(environs, self.outputs, strict=True)
        ]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            for process in self.processes:
                process.start()

    def says(self, words: str, rank: int = 0) -> None:
        """Wait until a rank has printed this."""
        self.until(lambda: self.outputs[rank].exists() and words in self.outputs[rank].read_text())

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds; fails when the run ends before."""
        while not holds():
            assert all(process.is_alive() for process in self.processes) or holds(), self.end()
            time.sleep(0.002)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, grace_s: float = LIMIT_S) -> Ended:
        """How it ends by itself; what takes too long, or this long after the first failure, is killed."""
        deadline = time.monotonic() + LIMIT_S
        while running := [process for process in self.processes if process.is_alive()]:
            if any(process.exitcode for process in self.processes):
                deadline, grace_s = min(deadline, time.monotonic() + grace_s), LIMIT_S
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            connection.wait([process.sentinel for process in running], 0.1)
        return Ended(
            [process.exitcode for process in self.processes],
            [output.read_text() if output.exists() else "" for output in self.outputs],
        )


def become_rank(words: list[str], environ: dict[str, str], output: Path, fault: Fault | None) -> None:
    """The life of a rank of this program, to which something happens."""
    if fault is not None:
        apply_fault(fault)
    live(sys.modules[__name__], words, environ, output)


if __name__ == "__main__":
    if told := os.environ.get("FAULT"):
        apply_fault(Fault(**json.loads(told)))
    main(sys.modules[__name__])
