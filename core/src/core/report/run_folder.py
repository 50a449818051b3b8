"""One run as its report sees it: all that its folder says, whatever became of the files."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from core.config.errors import UserError
from core.config.json_file import read_json
from core.config.record import differences
from core.report.columns import Columns, as_number, not_so
from core.runtime.records import EVENTS, RECORDS
from core.runtime.units import KIB, duration, rate, size_text

CONFIG, PLAN = "config.json", "plan.json"
TABLES = {
    "profiling.save_traces_folder": "profile_traces",
    "profiling.save_memory_snapshot_folder": "memory_snapshot",
}
"""The settings of the folders in which profiles write tables, and what these are where a run does not say."""
MOST_EVENTS = 300
"""So many events are shown, the newest."""
FILES = {CONFIG, RECORDS, EVENTS}
"""A folder with one of these is a run's."""


@dataclass
class RunFolder:
    """A run's folder, read by `read` and read on by each further call."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    profiles: dict[str, str] = field(default_factory=dict)
    """Tables of where the time and the memory of a step go, by the names of their files."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, a line each."""

    def __post_init__(self) -> None:
        self.columns = Columns(self.folder / RECORDS)
        self._seen: dict[str, int] = {}

    def read(self) -> bool:
        """Read what is new; whether there was something. What cannot be read is a note."""
        self.notes = []
        self.config = self._object(CONFIG)
        files = {name: self.folder / name for name in (CONFIG, EVENTS, PLAN)}
        tables = [file for folder in self._folders_of_tables() for file in sorted(folder.glob("*.txt"), key=numbers_in)]
        files |= {f"{file.parent.name}/{file.name}": file for file in tables}
        seen = {name: file.stat().st_mtime_ns for name, file in files.items() if file.exists()}
        changed, self._seen = seen != self._seen, seen
        self.plan = self._object(PLAN) if PLAN in seen else {}
        self.events = self._events()
        self.profiles = {name: file.read_text(errors="replace") for name, file in files.items() if name[-4:] == ".txt"}
        try:
            changed |= self.columns.read()
            self.notes += self.columns.notes()
        except OSError as error:
            self.notes.append(f"{RECORDS} cannot be read: {error.strerror}")
        return changed

    def _folders_of_tables(self) -> Iterator[Path]:
        """Where traces and snapshots are; of a path, which somebody else may have stated, the last part."""
        for setting, usual in TABLES.items():
            stated = self.setting(setting)
            yield self.folder / (Path(stated).name if isinstance(stated, str) else usual)

    def _object(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.folder / name)
        except UserError as error:
            self.notes.append(str(error).replace(f"{self.folder}/", ""))
            return {}

    def _events(self) -> list[dict[str, Any]]:
        file = self.folder / EVENTS
        if not file.exists():
            return []
        found, lines = [], file.read_bytes().splitlines()
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and type(event.get("step")) is int:
                found.append(event)
        if len(found) < len(lines):
            self.notes.append(not_so(len(lines) - len(found), f"of {EVENTS}", "event"))
        return found

    def setting(self, path: str) -> Any:
        """What the configuration says at a path such as training.steps; None where it says nothing."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def settings(self) -> dict[str, Any]:
        """Every setting by its path."""
        return {path: value for path, _, value in differences(self.config, {}) if value is not ...}

    def last(self, name: str) -> tuple[float, int] | None:
        """The last finite value of a number, and its step."""
        return self._value(name, lambda values: len(values) - 1)

    def best(self, name: str) -> tuple[float, int] | None:
        """The lowest value of a number, and its step."""
        return self._value(name, np.argmin)

    def _value(self, name: str, choose: Any) -> tuple[float, int] | None:
        values = self.columns[name]
        rows = np.flatnonzero(np.isfinite(values))
        if not len(rows):
            return None
        row = rows[choose(values[rows])]
        return float(values[row]), int(self.columns["step"][row])

    def tokens_per_second(self) -> float | None:
        """The median over all records but the first, whose step loads and compiles."""
        values = self.columns["tokens_per_second"]
        values = values[np.isfinite(values)]
        return float(np.median(values[1:] if len(values) > 1 else values)) if len(values) else None

    def facts(self) -> dict[str, str]:
        """What one wants to know first, by its name; what is not known is left out."""
        found: dict[str, str] = {}
        recipe, steps = self.setting("recipe"), self.setting("training.steps")
        if recipe:
            found["recipe"] = str(recipe)
        converters = self.setting("converters")
        classes = (
            [each.get("class") for each in converters if isinstance(each, dict)] if isinstance(converters, list) else []
        )
        if classes:
            found["converters"] = ", ".join(str(name).rpartition(":")[2] for name in classes)
        if last := self.last("step"):
            found["step"] = f"{last[1]:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")
        if last := self.last("loss"):
            found["loss"] = f"{last[0]:.4f}"
        if best := self.best("validation_loss"):
            found["best validation loss"] = f"{best[0]:.4f} at step {best[1]:,}"
        if tokens := self.last("tokens"):
            found["tokens"] = rate(tokens[0])
        if (speed := self.tokens_per_second()) is not None:
            found["tokens/s"] = rate(speed)
        if memory := self.last("memory_gib"):
            found["memory"] = size_text(memory[0] * KIB**3)
        if (times := self.columns.times()) is not None:
            found["training time"] = duration(times[-1])
        return found

    def systems(self) -> list[dict[str, str]]:
        """What the run was on at each of its starts."""
        starts = [event["system"] for event in self.events if isinstance(event.get("system"), dict)]
        return [{str(name): str(value) for name, value in start.items()} for start in starts]

    def schedule(self) -> list[list[float]]:
        """Steps and their learning rates, to the last step of the run, as it stated them when it last started."""
        stated = [event["schedule"] for event in self.events if isinstance(event.get("schedule"), list)]
        pairs = (pair for pair in (stated[-1] if stated else []) if isinstance(pair, list) and len(pair) == 2)
        return [pair for pair in pairs if np.isfinite([as_number(value) for value in pair]).all()]

    def planned(self) -> Iterator[tuple[str, str, str]]:
        """What the plan in plan.json said and what was measured: the name, and both as text."""
        plan, memory, speed = self.plan, self.last("memory_gib"), self.tokens_per_second()
        if isinstance(peak := plan.get("peak_bytes"), int):
            yield "memory of this rank", size_text(peak), size_text(memory[0] * KIB**3) if memory else ""
        flops, rows, length = (plan.get(name) for name in ("model_flops", "rows", "seq_len"))
        if isinstance(flops, int) and isinstance(rows, int) and isinstance(length, int):
            per_second = f"{rate(speed / (rows * length) * flops)} per second" if speed else ""
            yield "FLOPs of the model, this rank, a step", rate(flops), per_second
            yield "tokens in a step", f"{rows * length:,}", self._tokens_of_a_step()

    def _tokens_of_a_step(self) -> str:
        steps, tokens = self.columns["step"], self.columns["tokens"]
        return f"{tokens[-1] / steps[-1]:,.0f}" if len(steps) and np.isfinite(tokens[-1]) else ""

    def shown_events(self) -> list[dict[str, Any]]:
        """The newest events, each with step, name and text."""
        names = ("step", "event", "text", "time")
        return [{name: event.get(name) for name in names} for event in self.events[-MOST_EVENTS:]]


def found_runs(words: Sequence[str]) -> list[RunFolder]:
    """The runs that these folders, or patterns of such, name, each once, and of a pattern those alone that are runs.
    Raises `UserError` for a folder that is no run, or that is not there."""
    folders: dict[Path, None] = {}
    for word in words:
        matches = sorted(glob(word)) if has_magic(word) else [word]
        there = [Path(match) for match in matches if is_run(Path(match))]
        if not there:
            reason = "has no config.json and no metrics.jsonl" if Path(word).is_dir() else "is not there"
            raise UserError(f"{word} is no run: it {reason if not has_magic(word) else 'matches no run'}")
        folders |= dict.fromkeys(there)
    paths = list(folders)
    names = [path.resolve().name for path in paths]
    return [
        RunFolder(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def numbers_in(file: Path) -> list[int]:
    """The numbers in the name of a file, such as step-10-rank-0.txt."""
    return list(map(int, re.findall(r"\d+", file.name)))


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    return any((folder / name).is_file() for name in FILES)
