"""The file of a run's records, metrics.jsonl: read whatever became of it, and carried on."""

import logging
from pathlib import Path
from typing import Any

from core.config.errors import UserError
from core.config.json_file import parse_json
from core.runtime.disk import replace_file

log = logging.getLogger("armature")

RECORDS = "metrics.jsonl"
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


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records in a folder's metrics.jsonl, in order; lines that are none are left out. Raises `OSError`."""
    file = folder / RECORDS
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    return [record for line in lines if (record := parse_record(line)) is not None]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where there is none."""
    try:
        record = parse_json(line, RECORDS)
    except UserError:
        return None
    return record if type(record.get("step")) is int else None


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _vacant(folder: Path) -> Path:
    """The first name of an attempt that is free."""
    number = 0
    while (file := folder / f"metrics.attempt-{number}.jsonl").exists():
        number += 1
    return file
