"""The records of a run as columns of numbers, read on as the file grows."""

import json
from array import array
from collections.abc import Iterator
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

MOST_NAMED = 3
"""So many steps are named in a note."""


class Columns:
    """What a metrics.jsonl holds, a column of float64 per name, with nan where a record has no number.

    `read` takes up what has been added since. A file that was replaced, as a run that goes on replaces it, is read from
    its beginning. Steps that were trained again count once, as they were the last time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._clear()

    def _clear(self) -> None:
        self.columns: dict[str, array] = {"step": array("d")}
        self._offset, self._inode = 0, 0
        self.n_damaged = self.n_again = 0
        self.rest = b""
        """The bytes behind the last line end: a line that is being written, or was when the run was killed."""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, of shape (n,); all nan for a name that no record has."""
        return np.frombuffer(self.columns[name], dtype=float) if name in self.columns else np.full(len(self), nan)

    def read(self) -> bool:
        """Take up what is new; whether there was something. Raises `OSError` where the file cannot be read."""
        with self.file.open("rb") as stream:
            state = self.file.stat()
            replaced = self._inode not in (0, state.st_ino) or state.st_size < self._offset
            if replaced:
                self._clear()
            self._inode = state.st_ino
            stream.seek(self._offset)
            data = stream.read()
        whole, newline, self.rest = data.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n") if newline else []:
            self._add(line)
        return bool(newline) or replaced

    def _add(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            self.n_damaged += 1
            return
        steps = self.columns["step"]
        while steps and steps[-1] >= record["step"]:
            self.n_again += 1
            for column in self.columns.values():
                column.pop()
        n = len(steps)
        for name, value in record.items():
            if name not in self.columns:
                self.columns[name] = array("d", [nan]) * n
            self.columns[name].append(as_number(value))
        for column in self.columns.values():
            if len(column) == n:
                column.append(nan)

    def notes(self) -> Iterator[str]:
        """What is wrong with the file, a line each."""
        if self.n_damaged:
            yield not_so(self.n_damaged, f"of {self.file.name}", "record")
        if self.rest.strip():
            yield f"the last line of {self.file.name} is half written"
        if self.n_again:
            yield f"{self.n_again:,} records of {self.file.name} are of steps that were trained again"
        for name in ("loss", "grad_norm"):
            if name in self.columns and not (finite := np.isfinite(self[name])).all():
                steps = [f"{step:,.0f}" for step in self["step"][~finite]]
                more = f" and {len(steps) - MOST_NAMED:,} more" if len(steps) > MOST_NAMED else ""
                yield f"{name} is no finite number at step {', '.join(steps[:MOST_NAMED])}{more}"
        if len(self) == 0:
            yield f"{self.file.name} holds no record: nothing to draw"

    def names(self) -> list[str]:
        """The names under which there is a number."""
        return [name for name, column in self.columns.items() if name != "step" and not all(map(isnan, column))]

    def times(self) -> np.ndarray | None:
        """Seconds of training up to each record, of shape (n,): those between records and in validation not counted.
        None where the records have none."""
        if not len(self) or not np.isfinite(each := self["step_time_s"]).all():
            return None
        return np.cumsum(each * np.diff(self["step"], prepend=0.0))


def not_so(n: int, where: str, what: str) -> str:
    """What is said of `n` lines of a file that are not what they should be."""
    return f"1 line {where} is no {what}" if n == 1 else f"{n:,} lines {where} are no {what}s"


def as_number(value: Any) -> float:
    """A value of a record as a number; nan for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else nan
