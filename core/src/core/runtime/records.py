"""The records of a run, metrics.jsonl: read whatever became of the file."""

from pathlib import Path
from typing import Any

from core.config.errors import UserError
from core.config.json_file import parse_json

RECORDS = "metrics.jsonl"


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
