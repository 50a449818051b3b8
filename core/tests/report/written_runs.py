"""Folders of runs, written by hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def record(step: int, **numbers: Any) -> dict[str, Any]:
    """A record as a run writes it."""
    known = {"loss": 8.0 / step + 2, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 512, "tokens_per_second": 1000.0}
    return {
        "step": step,
        **known,
        "step_time_s": 0.512,
        "memory_gib": 0.5,
        "validation_loss": None,
        "mfu": None,
    } | numbers


def lines_of(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in records)


def write_run(
    folder: Path, records: Iterable[dict[str, Any]], config: dict[str, Any] | None = None, rest: str = ""
) -> Path:
    """A run's folder with these records, and `rest` at the end of their file."""
    folder.mkdir(parents=True)
    stated = {"recipe": "toy", "training": {"steps": 100}} if config is None else config
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "metrics.jsonl").write_text(lines_of(records) + rest)
    return folder
