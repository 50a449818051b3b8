"""The folder of a run: a new one for each, so that no two runs mix their records."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from core.config.errors import UserError
from core.runtime.distributed import launch_id

ANOTHER = "choose another with --dump_folder, or --dump_folder None for outputs/<recipe>-<time>"
LAUNCH = "torchrun-id"
"""File that says which torchrun a run belongs to."""


def check_run_folder(dump_folder: str | None, environ: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` when the folder that was asked for is no folder, or already holds a run.

    What an earlier attempt of the same torchrun left is no other run.
    """
    if dump_folder is None:
        return
    folder = Path(dump_folder)
    if not dump_folder or (folder.exists() and not folder.is_dir()):
        raise UserError(f'dump_folder "{dump_folder}" is not a folder: {ANOTHER}')
    if (folder / "metrics.jsonl").exists() and not _is_ours(folder, environ):
        raise UserError(f"dump_folder {folder} already holds a run: {ANOTHER}")
    if environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and launch_id(environ) is None:
        raise UserError(
            f"a restart by torchrun could not tell its own dump_folder {folder} from another run's: add "
            "--rdzv-id NAME to torchrun's options, or leave dump_folder out"
        )


def make_run_folder(dump_folder: str | None, recipe: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Make the folder that was asked for, or else outputs/<recipe>-<time>, with a number where another run has that.

    Metrics of an earlier attempt of the same torchrun are kept as metrics.attempt-<number>.jsonl.
    """
    stem = f"outputs/{recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    chosen = Path(stem if dump_folder is None else dump_folder)
    try:
        chosen.parent.mkdir(parents=True, exist_ok=True)
        if dump_folder is None:
            return next(filter(_made, [chosen, *(Path(f"{stem}-{n}") for n in range(2, 1000))]))
        chosen.mkdir(exist_ok=True)
        if launch := launch_id(environ):
            (chosen / LAUNCH).write_text(launch)
        metrics = chosen / "metrics.jsonl"
        if metrics.exists():
            metrics.rename(chosen / f"metrics.attempt-{len(list(chosen.glob('metrics.attempt-*')))}.jsonl")
    except OSError as error:
        raise UserError(f"cannot make the run's folder {chosen}: {error.strerror}; {ANOTHER}") from error
    return chosen


def _is_ours(folder: Path, environ: Mapping[str, str]) -> bool:
    launch, known = launch_id(environ), folder / LAUNCH
    return launch is not None and known.exists() and known.read_text() == launch


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
