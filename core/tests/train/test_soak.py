"""A run of many steps, with everything on that a long one has: nothing grows, and nothing is written twice."""

import json
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_run import toy_run

from core.config.record import from_json, to_json
from core.step.update import StepInfo
from core.testing.ranks import run_ranks
from core.train.trainer import Trainer

N_STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
SETTLED = max(N_STEPS // 20, 200)
"""From this step on nothing grows: 1,000 of 20,000, and by then everything was done once."""
EVERY = 25
GROWTH = 1.02
"""So many times the memory of the steps after SETTLED may a run have at its end."""
LIMIT_S = 3600.0


class Sample(NamedTuple):
    """What a process had after a step, while no save was going on behind it."""

    step: int
    memory_kib: int
    n_descriptors: int
    n_threads: int


def sample(step: int) -> Sample:
    n_pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
    return Sample(step, n_pages * os.sysconf("SC_PAGE_SIZE") // 1024, *counts)


def soak(run: str) -> list[Sample]:
    """Train; what this rank had every 25 steps."""
    trainer = from_json(run).build()
    assert isinstance(trainer, Trainer)
    train_step, samples = trainer.step, []

    def step(number: int) -> StepInfo:
        info = train_step(number)
        saving = trainer.checkpoints.saver._running
        if number % EVERY == EVERY - 1 and (saving is None or saving.done()):
            samples.append(sample(number))
        return info

    trainer.step = step
    trainer.run()
    return samples


def soaked_run(folder: Path) -> Trainer.Config:
    run = toy_run(folder, steps=N_STEPS)
    run.training.local_batch_size, run.training.global_batch_size = 2, 4
    run.lr_scheduler.warmup_steps, run.optimizer.lr = 100, 1e-3
    run.validator.enable, run.validator.freq, run.validator.steps = True, 100, 2
    run.metrics.log_freq, run.metrics.enable_tensorboard = 10, True
    run.checkpoint.enable, run.checkpoint.interval, run.checkpoint.keep_latest_k = True, 50, 2
    run.checkpoint.async_mode, run.checkpoint.keep_best_k = "async", 1
    return run


def check_flat(samples: list[Sample]) -> str:
    """Memory, descriptors and threads of a rank, which must not grow."""
    settled = [each for each in samples if each.step > SETTLED]
    n = len(settled) // 10
    assert n > 1, f"{len(settled)} samples are too few"
    first, last = (statistics.median(each.memory_kib for each in part) for part in (settled[:n], settled[-n:]))
    counts = [{each[index] for each in settled} for index in (2, 3)]
    text = f"memory {first / 1024:.1f} to {last / 1024:.1f} MiB, descriptors {counts[0]}, threads {counts[1]}"
    assert last <= GROWTH * first, text
    assert all(len(found) == 1 for found in counts), text
    return text


@pytest.mark.soak
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_nothing_grows_and_every_record_is_there_once(tmp_path: Path, n_ranks: int) -> None:
    run = soaked_run(tmp_path)
    for rank, samples in enumerate(run_ranks(soak, n_ranks, to_json(run), timeout_s=LIMIT_S)):
        print(f"rank {rank} of {n_ranks}: {check_flat(samples)}")
    folder = Path(str(run.dump_folder))
    reported = sorted({1, *range(10, N_STEPS + 1, 10)})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == reported
    validated = [record["step"] for record in records if record["validation_loss"] is not None]
    assert validated == list(range(100, N_STEPS + 1, 100))
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    steps = {tag: Counter(event.step for event in events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert steps["loss"] == Counter(reported) and steps["validation_loss"] == Counter(validated)
    losses = {record["step"]: record["validation_loss"] for record in records}
    best = min(validated, key=lambda step: (losses[step], -step))
    kept = sorted({N_STEPS - 50, N_STEPS, best})
    assert sorted(os.listdir(folder / "checkpoint")) == sorted([".lock", *(f"step-{step}" for step in kept)])
