"""The folders of a run of several groups: one of each group in that of the run, so that no two write to one file.

<dump_folder>/finished.json          the run came to its last step
<dump_folder>/group-0/               the run folder of a group: config.json, metrics.jsonl, checkpoint
<dump_folder>/group-1/
"""

import json
from contextlib import suppress
from pathlib import Path

from core.checkpoint.settings import Checkpoint
from core.config.json_file import read_json
from core.runtime.disk import needed, replace_file
from core.runtime.records import RECORDS
from core.train.folder import ANOTHER

FINISHED = "finished.json"


def group_folder(dump_folder: str, group: int) -> str:
    """The run folder of a group; that of the run is made. Raises `UserError` where it cannot be."""
    with needed(dump_folder, ANOTHER):
        Path(dump_folder).mkdir(parents=True, exist_ok=True)
    return str(Path(dump_folder) / f"group-{group}")


def set_aside(folder: Path, checkpoint: Checkpoint) -> None:
    """Rename the records of an attempt of a group that has no checkpoints of its own, as most have none: it comes back
    to the same run. Every rank may call it, before any of them has begun to write."""
    if not checkpoint.continues(folder):
        number = len(list(folder.glob("metrics.attempt-*.jsonl")))
        with needed(folder, ANOTHER), suppress(FileNotFoundError):
            (folder / RECORDS).rename(folder / f"metrics.attempt-{number}.jsonl")


def finished_step(folder: Path) -> int:
    """The last step of the run of a group's folder, where groups have finished it; else 0."""
    file = folder.parent / FINISHED
    return int(read_json(file)["step"]) if file.exists() else 0


def leave_word(folder: Path, step: int) -> None:
    """Say in the folder of the run, for groups that come later, that it came to its last step."""
    with needed(folder.parent, ANOTHER):
        replace_file(folder.parent / FINISHED, json.dumps({"step": step}).encode())
