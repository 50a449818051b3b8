"""The folder of a run: a new one for each, so that no two runs mix their records."""

import time
from pathlib import Path

from core.config.errors import UserError

ANOTHER = "choose another with --dump_folder, or --dump_folder None for outputs/<recipe>-<time>"


def check_run_folder(dump_folder: str | None) -> None:
    """Raise `UserError` when the folder that was asked for is no folder, or already holds a run."""
    if dump_folder is None:
        return
    folder = Path(dump_folder)
    if not dump_folder or (folder.exists() and not folder.is_dir()):
        raise UserError(f'dump_folder "{dump_folder}" is not a folder: {ANOTHER}')
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"dump_folder {folder} already holds a run: {ANOTHER}")


def make_run_folder(dump_folder: str | None, recipe: str) -> Path:
    """Make the folder that was asked for, or else outputs/<recipe>-<time>, with a number where another run has that."""
    stem = f"outputs/{recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    chosen = Path(stem if dump_folder is None else dump_folder)
    try:
        chosen.parent.mkdir(parents=True, exist_ok=True)
        if dump_folder is None:
            return next(filter(_made, [chosen, *(Path(f"{stem}-{n}") for n in range(2, 1000))]))
        chosen.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run's folder {chosen}: {error.strerror}; {ANOTHER}") from error
    return chosen


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
