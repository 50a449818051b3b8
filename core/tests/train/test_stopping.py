"""How a run is asked to stop or to save, and consoles that do not last as long as it."""

import io
import json
import multiprocessing
import os
import pty
import signal
import sys
from pathlib import Path
from unittest import mock

import faulty_run
import pytest
import torch
from faulty_run import LIMIT_S, N_STEPS, Fault, Launched, saved_run

from core.config.cli import main
from core.config.errors import UserError
from core.config.record import to_json
from core.config.validate import validate
from core.runtime.signals import SIGNALS
from core.step.update import StepInfo
from core.testing.ranks import PRELOAD
from core.train.trainer import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Where the text is, tokenised once."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def run(text, tmp_path) -> Trainer.Config:
    """A run in a folder of its own."""
    run = saved_run(text)
    run.dump_folder = str(tmp_path / "run")
    return run


def saved_steps(run: Trainer.Config) -> list[str]:
    return sorted(name for name in os.listdir(f"{run.dump_folder}/checkpoint") if name.startswith("step-"))


def reported_steps(run: Trainer.Config) -> list[int]:
    lines = Path(f"{run.dump_folder}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


# Signals


def signal_in(step: int, monkeypatch, number: signal.Signals) -> None:
    """Have this process receive a signal while it trains a step."""
    take_step = Trainer.step

    def step_with_signal(trainer: Trainer, of: int) -> StepInfo:
        if of == step:
            os.kill(os.getpid(), number)
        return take_step(trainer, of)

    monkeypatch.setattr(Trainer, "step", step_with_signal)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_saves_and_stops_after_the_step(run, monkeypatch, capsys, number):
    signal_in(3, monkeypatch, number)
    run.build().run()
    said = capsys.readouterr().out
    assert f"{number.name}: stopping after this step (once more to stop at once)\nstep 3/6" in said
    assert f"stopped by {number.name} after step 3 of 6" in said
    assert saved_steps(run) == ["step-2", "step-3"] and reported_steps(run) == [1, 2, 3]


def test_a_signal_in_a_validation_ends_it_and_the_run(run, monkeypatch, capsys):
    run.validator.enable, run.validator.freq = True, 3
    trainer = run.build()
    evaluate = trainer.objective.evaluate

    def evaluate_with_signal(batches: list) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(batches)

    monkeypatch.setattr(trainer.objective, "evaluate", evaluate_with_signal)
    trainer.run()
    assert "stopped by SIGTERM after step 3 of 6" in capsys.readouterr().out
    assert saved_steps(run) == ["step-2", "step-3"] and reported_steps(run) == [1, 2, 3]


class Interrupted(io.RawIOBase):
    """Standard output that this process receives SIGTERM in the middle of."""

    def __init__(self) -> None:
        self.text = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.text += bytes(data)
        if b"step 3/6" in bytes(data):
            os.kill(os.getpid(), signal.SIGTERM)
        return len(data)


def test_a_signal_in_the_middle_of_a_print_saves(run, monkeypatch):
    raw = Interrupted()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True))
    run.build().run()
    assert b"SIGTERM: stopping after this step" in raw.text and b"stopped by SIGTERM after step 4 of 6" in raw.text
    assert saved_steps(run) == ["step-2", "step-4"]


@pytest.mark.parametrize(("n_ranks", "mode"), [(1, "disabled"), (2, "async")])
def test_sigusr1_may_save_and_go_on(run, n_ranks, mode):
    run.checkpoint.on_sigusr1, run.checkpoint.async_mode = "save", mode
    ended = Launched(run, n_ranks=n_ranks, fault=Fault("SIGUSR1", rank=n_ranks - 1, step=3)).end()
    assert ended.codes == [0] * n_ranks, ended.texts
    assert f"finished {N_STEPS} steps" in ended.texts[0] and "SIGUSR1" not in ended.texts[0]
    assert saved_steps(run) == ["step-2", "step-3", "step-4", "step-6"]


def test_two_ranks_stop_for_a_signal_to_one(run):
    ended = Launched(run, n_ranks=2, fault=Fault("SIGUSR2", rank=1, step=3)).end()
    assert ended.codes == [0, 0], ended.texts
    assert "a signal to another rank: stopping after this step\nstep 3/6" in ended.texts[0]
    assert saved_steps(run) == ["step-2", "step-3"]


def test_saving_on_a_signal_needs_checkpoints(run):
    run.checkpoint.on_sigusr1 = "save"
    validate(run)
    for name, value in (("load_only", True), ("enable", False)):
        setattr(run.checkpoint, name, value)
        with pytest.raises(UserError, match="checkpoint.on_sigusr1: on_sigusr1 save needs checkpoints: add --check"):
            validate(run)


# Consoles


def become_program(words: list[str], console: str, environ: dict[str, str]) -> None:
    """The life of a program whose standard output and error are `console`: a file, or a terminal that is its own."""
    os.environ.update(environ)
    os.setsid()
    descriptor = os.open(console, os.O_RDWR)
    for number in (1, 2):
        os.dup2(descriptor, number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = open(number, "w", encoding="ascii", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    torch.set_num_threads(1)
    main(faulty_run, words)
    sys.stdout.flush()
    sys.stderr.flush()


def start(run: Trainer.Config, console: str) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    file = Path(str(run.dump_folder)).with_suffix(".json")
    file.write_text(to_json(run))
    process = context.Process(target=become_program, args=(["--config", str(file)], console, {}))
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        process.start()
    return process


def test_a_full_log_disk_and_an_english_console_end_no_run(run, text):
    run.dataloader.dataset = str((text / "text").rename(text / "téxt"))
    process = start(run, "/dev/full")
    process.join(LIMIT_S)
    (text / "téxt").rename(text / "text")
    assert process.exitcode == 0
    assert saved_steps(run) == ["step-2", "step-4", "step-6"] and reported_steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_reader_that_leaves_ends_no_run(run, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    process = start(run, str(fifo))
    os.set_blocking(reader, True)
    os.close(reader)
    process.join(LIMIT_S)
    assert process.exitcode == 0
    assert saved_steps(run) == ["step-2", "step-4", "step-6"] and reported_steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_terminal_closes_is_saved(run):
    run.training.steps = 10_000
    controller, terminal = pty.openpty()
    process = start(run, os.ttyname(terminal))
    said = b""
    while b"step     2/10000" not in said:
        said += os.read(controller, 4096)
    os.close(terminal)
    os.close(controller)
    process.join(LIMIT_S)
    assert process.exitcode == 0
    last = reported_steps(run)[-1]
    assert saved_steps(run)[-1] == f"step-{last}" and last < 10_000
