"""The file of a run's records, metrics.jsonl, carried on by a run that goes on."""

import logging
from pathlib import Path

from core.runtime.disk import replace_file
from core.runtime.records import RECORDS, parse_record

log = logging.getLogger("armature")

SET_ASIDE = "metrics.set-aside.jsonl"
"""Lines that are no records."""


def carry_on(folder: Path, step: int) -> None:
    """Leave in metrics.jsonl the records up to `step`, which the run goes on from. Raises `OSError`.

    Where there are later ones the file as it was is kept as metrics.attempt-<number>.jsonl. Lines that are no records,
    torn by a kill or of somebody else, move to metrics.set-aside.jsonl. The file is there whole at every moment.
    """
    file = folder / RECORDS
    if not file.exists():
        return
    data = file.read_bytes()
    lines = [line for line in data.split(b"\n") if line]
    records = [(line, parse_record(line)) for line in lines]
    kept = _joined([line for line, record in records if record is not None and record["step"] <= step])
    others = [line for line, record in records if record is None]
    if any(record is not None and record["step"] > step for _, record in records):
        replace_file(_vacant(folder), data)
    if others:
        aside = folder / SET_ASIDE
        before = aside.read_bytes() if aside.exists() else b""
        replace_file(aside, before + _joined(others))
        log.warning(f"{file}: {len(others):,} of {len(lines):,} lines are no records, and are now in {SET_ASIDE}")
    if kept != data:
        replace_file(file, kept)


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _vacant(folder: Path) -> Path:
    """The first name of an attempt that is free."""
    number = 0
    while (file := folder / f"metrics.attempt-{number}.jsonl").exists():
        number += 1
    return file
