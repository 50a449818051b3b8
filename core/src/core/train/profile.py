"""Traces of single steps, for chrome://tracing and Perfetto, and where their time goes."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EIO
from pathlib import Path
from typing import Any

import torch

from core.config.configurable import Configurable
from core.runtime.disk import OptionalFile, needed, replace_file
from core.train.folder import ANOTHER
from core.train.step_times import time_table

log = logging.getLogger("armature")


class Profiler(Configurable):
    """Records some steps of every `profile_freq` with torch.profiler while the block runs."""

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

    def __init__(self, config: Config, *, folder: Path, rank: int, start: int = 0) -> None:
        """`start` steps were trained before: recordings keep the numbers that they have in a run that never stopped.

        Raises `UserError` where no folder for them can be made.
        """
        self.folder, self.rank, self.start = folder / config.save_traces_folder, rank, start
        self._traces = OptionalFile(self.folder)
        self._profile = None
        if config.enable_profiling:
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

    def __enter__(self) -> "Profiler":
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)

    def step(self) -> None:
        """Say that a step is over."""
        if self._profile is not None:
            with warnings.catch_warnings():
                # A recording is written out when it ends, so nothing is lost by clearing it.
                warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
                self._profile.step()
