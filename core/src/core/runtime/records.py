"""The files that a run writes a line at a time, and its records, read whatever became of the file."""

from pathlib import Path
from typing import Any

from core.config.errors import UserError
from core.config.json_file import parse_json

RECORDS = "metrics.jsonl"
EVENTS = "events.jsonl"
"""Starts, saves, steps left out: what happened, a line each."""


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records in a folder's metrics.jsonl, in order; lines that are none are left out. Raises `OSError`."""
    file = folder / RECORDS
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    return [record for line in lines if (record := parse_record(line)) is not None]


def best_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record in a folder's metrics.jsonl with the lowest value of this name; None where none has one. Raises
    `OSError`."""
    file, nothing = folder / RECORDS, f'"{name}": null'.encode()
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    records = [record for line in lines if nothing not in line and (record := parse_record(line)) is not None]
    values = [record for record in records if isinstance(record.get(name), float)]
    return min(values, key=lambda record: record[name], default=None)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where there is none."""
    try:
        record = parse_json(line, RECORDS)
    except UserError:
        return None
    return record if type(record.get("step")) is int else None
