"""Traces of single steps, for chrome://tracing and Perfetto, and where their time and their memory go."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.config.configurable import Configurable
from core.optim.optimizer import Optimizer
from core.runtime.device import peak_memory
from core.runtime.disk import OptionalFile, needed, replace_file
from core.runtime.units import size_text
from core.step.assemble import BuiltModel
from core.step.update import StepInfo
from core.train.folder import ANOTHER
from core.train.step_memory import measured_memory
from core.train.step_times import time_table

log = logging.getLogger("armature")

MOST_ALLOCATIONS = 100_000
"""So many are in a snapshot, the newest."""


class Profiler(Configurable):
    """Records some steps of every `profile_freq` while the block runs: time with torch.profiler, memory by tensors."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        enable_profiling: bool = False
        """Write traces, and tables of where the time of a step goes."""
        save_traces_folder: str = "profile_traces"
        """Where, below the run folder; one trace and one table per recording and rank, named by its last step and the
        rank."""
        profile_freq: int = 10
        """Steps from the start of one recording to the start of the next."""
        profiler_warmup: int = 3
        """Steps that the profiler watches without recording, right before."""
        profiler_active: int = 1
        """Steps in one recording."""
        enable_memory_snapshot: bool = False
        """Write tables of where the memory of a step goes, of the second step and every profile_freq-th after it; with
        CUDA also snapshots for PyTorch's viewer (pytorch.org/memory_viz), and one where memory runs out."""
        save_memory_snapshot_folder: str = "memory_snapshot"
        """Where, below the run folder; one table and one snapshot per measured step and rank."""

        def problems(self) -> Iterator[tuple[str, str]]:
            for name, least in (("profile_freq", 1), ("profiler_warmup", 0), ("profiler_active", 1)):
                if getattr(self, name) < least:
                    yield name, f"{name} {getattr(self, name)} must be at least {least}"
            needed = self.profiler_warmup + self.profiler_active
            if self.profile_freq < needed:
                yield (
                    "profile_freq",
                    f"profile_freq {self.profile_freq} must be at least profiler_warmup + profiler_active = {needed}",
                )

    def __init__(self, config: Config, *, folder: Path, rank: int, device: torch.device, start: int = 0) -> None:
        """`start` steps were trained before: recordings keep the numbers that they have in a run that never stopped.

        Raises `UserError` where no folder for them can be made.
        """
        self.config, self.rank, self.device, self.start = config, rank, device, start
        self.folder, self.memory_folder = (
            folder / config.save_traces_folder,
            folder / config.save_memory_snapshot_folder,
        )
        self._traces, self._snapshots = OptionalFile(self.folder), OptionalFile(self.memory_folder)
        self._profile = None
        if config.enable_memory_snapshot:
            with needed(self.memory_folder, ANOTHER):
                self.memory_folder.mkdir(parents=True, exist_ok=True)
        if config.enable_profiling:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints a line at both ends of a recording otherwise
            with needed(self.folder, ANOTHER):
                self.folder.mkdir(parents=True, exist_ok=True)
            wait = config.profile_freq - config.profiler_warmup - config.profiler_active
            action = torch.profiler.schedule(wait=wait, warmup=config.profiler_warmup, active=config.profiler_active)
            self._profile = torch.profiler.profile(
                schedule=lambda step: action(max(step, start)), on_trace_ready=self._write, record_shapes=True
            )
            self._profile.step_num = start

    def _write(self, profile: Any) -> None:
        file = self.folder / f"step-{profile.step_num}-rank-{self.rank}.json"
        with self._traces.attempt():
            profile.export_chrome_trace(str(file))
            if not file.exists():  # PyTorch writes beside it, and says nothing of a disk that is full
                file.with_name(f"{file.name}.tmp").unlink(missing_ok=True)
                raise OSError(EIO, "PyTorch's profiler could not write it")
            log.info(f"trace written to {file}")
        table = time_table(
            profile.events(), f"where the time of a step goes, up to step {profile.step_num}, rank {self.rank}"
        )
        with self._traces.attempt():
            replace_file(file.with_suffix(".txt"), table.encode())
        log.info(table.rstrip())

    def measured(self, step: int, take: Callable[[int], StepInfo], built: BuiltModel, optimizer: Optimizer) -> StepInfo:
        """What `take` returns for a step, whose memory is measured where its turn has come."""
        if not self.config.enable_memory_snapshot or (step - 2) % self.config.profile_freq:
            return take(step)
        info, peak = measured_memory(partial(take, step), built.models, optimizer)
        whose = "this process" if self.device.type == "cpu" else "the allocator"
        title = f"where the memory of step {step} goes, rank {self.rank}"
        table = peak.table(f"{title}; {whose} has had {size_text(peak_memory(self.device))} at most")
        with self._snapshots.attempt():
            replace_file(self.memory_folder / f"step-{step}-rank-{self.rank}.txt", table.encode())
        log.info(table.rstrip())
        self._snapshot(f"step-{step}")
        return info

    def _snapshot(self, name: str) -> None:
        """Write what CUDA's allocator did."""
        if self.config.enable_memory_snapshot and self.device.type == "cuda":
            with self._snapshots.attempt():
                torch.cuda.memory._dump_snapshot(str(self.memory_folder / f"{name}-rank-{self.rank}.pickle"))

    def __enter__(self) -> "Profiler":
        if self.config.enable_memory_snapshot and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if isinstance(error[1], torch.OutOfMemoryError):
            self._snapshot("out-of-memory")
        if self._profile is not None:
            self._profile.__exit__(*error)

    def step(self) -> None:
        """Say that a step is over."""
        if self._profile is not None:
            with warnings.catch_warnings():
                # A recording is written out when it ends, so nothing is lost by clearing it.
                warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
                self._profile.step()
