"""The folders of a run of several groups: one of each group in that of the run, so that no two write to one file.

<dump_folder>/finished.json          the run came to its last step; its settings
<dump_folder>/group-0/               the run folder of a group: config.json, metrics.jsonl, checkpoint
<dump_folder>/group-1/
"""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.json_file import read_json
from core.config.links import check_targets
from core.runtime.disk import needed, replace_file
from core.runtime.records import RECORDS
from core.train.folder import ANOTHER, LOCK
from fault_tolerance.state import unequal

FINISHED = "finished.json"


def group_folder(dump_folder: str, group: int) -> str:
    """The run folder of a group; that of the run, which may be named by the folder of one of its groups, is made.
    Raises `UserError` where it cannot be."""
    folder = Path(dump_folder)
    if re.fullmatch(r"group-\d+", folder.name):
        folder = folder.parent
    with needed(folder, ANOTHER):
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"group-{group}")


def set_aside(folder: Path, checkpoint: Checkpoint) -> None:
    """Rename the records of an attempt of a group that has no checkpoints of its own, as most have none: it comes back
    to the same run. Every rank may call it, before any of them has begun to write. Raises `UserError` where another
    process is writing there."""
    records = folder / RECORDS
    if checkpoint.continues(folder) or not records.exists():
        return
    names = (folder / f"metrics.attempt-{number}.jsonl" for number in count())
    with needed(folder, ANOTHER), suppress(FileNotFoundError), unlocked(folder):
        records.rename(next(name for name in names if not name.exists()))


@contextmanager
def unlocked(folder: Path) -> Iterator[None]:
    """Keep a run from locking its folder while the block runs. Raises `UserError` where one has."""
    check_targets(folder, [LOCK])
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # ranks of one group share it
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another process: this group runs already; start one with another "
                "--fault_tolerance.group"
            ) from error
        except OSError:
            pass  # a folder that cannot be locked: core warns of it
        yield


def is_finished(folder: Path, last_step: int, settings: dict[str, Any]) -> bool:
    """Whether groups have finished the run of a group's folder. Raises `UserError` where that was one of other
    settings."""
    file = folder.parent / FINISHED
    word = read_json(file) if file.exists() else {"step": 0}
    if word["step"] < last_step:
        return False
    if found := unequal(settings, word["settings"]):
        raise UserError(
            "\n  ".join([f"{folder.parent} holds a run of other settings, finished after step {word['step']}:", *found])
            + f"\n{ANOTHER}"
        )
    return True


def leave_word(folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Say in the folder of the run, for groups that come later, that it came to its last step."""
    file = folder.parent / FINISHED
    if not file.exists() or read_json(file)["step"] < step:
        with needed(folder.parent, ANOTHER):
            replace_file(file, json.dumps({"step": step, "settings": settings}).encode())
