"""The folder of a run: a new one for each, so that no two runs mix their records."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.checkpoint.settings import Checkpoint
from core.comm.backend import installed
from core.config.errors import UserError
from core.config.links import check_targets
from core.config.record import absolute, located, to_json
from core.runtime.disk import needed, replace_file
from core.runtime.distributed import keep_traces_in
from core.runtime.launcher import launch_id
from core.runtime.log import events_to, log_to
from core.runtime.records import EVENTS

ANOTHER = "choose another with --dump_folder, or --dump_folder None for outputs/<recipe>-<time>"
LAUNCH = "torchrun-id"
"""File that says which torchrun a run belongs to."""
LOCK = ".lock"
TARGETS = (LOCK, LAUNCH, "config.json", "metrics.jsonl", EVENTS)
"""Files that a run writes in its folder."""


def check_run_folder(dump_folder: str | None, checkpoint: Checkpoint, environ: Mapping[str, str] = os.environ) -> None:
    """Raise `UserError` when the folder that was asked for is no folder, or already holds a run.

    What an earlier attempt of the same torchrun left is no other run, nor one with checkpoints to go on from.
    """
    if dump_folder is None:
        return
    try:
        _check_folder(dump_folder, checkpoint, environ)
    except OSError as error:
        raise UserError(f'dump_folder "{dump_folder}" cannot be read: {error.strerror}; {ANOTHER}') from error
    if environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and launch_id(environ) is None:
        raise UserError(
            f"a restart by torchrun could not tell its own dump_folder {dump_folder} from another run's: add "
            "--rdzv-id NAME to torchrun's options, or leave dump_folder out"
        )


def _check_folder(dump_folder: str, checkpoint: Checkpoint, environ: Mapping[str, str]) -> None:
    folder = Path(dump_folder)
    if not dump_folder or (folder.exists() and not folder.is_dir()):
        raise UserError(f'dump_folder "{dump_folder}" is not a folder: {ANOTHER}')
    check_targets(folder, TARGETS)
    known = _is_ours(folder, environ) or checkpoint.continues(folder)
    if (folder / "metrics.jsonl").exists() and not known:
        without = ", and no checkpoint to go on from" if checkpoint.enable and checkpoint.resume != "never" else ""
        raise UserError(f"dump_folder {folder} already holds a run{without}: {ANOTHER}")


def make_run_folder(dump_folder: str | None, recipe: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Make the folder that was asked for, or else outputs/<recipe>-<time>, with a number where another run has that."""
    stem = f"outputs/{recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    chosen = Path(stem if dump_folder is None else dump_folder)
    try:
        chosen.parent.mkdir(parents=True, exist_ok=True)
        if dump_folder is None:
            return next(filter(_made, [chosen, *(Path(f"{stem}-{n}") for n in range(2, 1000))]))
        chosen.mkdir(exist_ok=True)
        if launch := launch_id(environ):
            replace_file(chosen / LAUNCH, launch.encode())
    except OSError as error:
        raise UserError(f"cannot make the run's folder {chosen}: {error.strerror}; {ANOTHER}") from error
    return chosen


def resolved(config: Any, device: torch.device) -> Any:
    """The configuration of a run on `device`, with the generation of DeepEP that it has, and the mask of its rows."""
    backend = installed(config.parallelism.expert_parallel_comm_backend, device)
    parallelism = replace(config.parallelism, expert_parallel_comm_backend=backend)
    training = replace(config.training, mask=config.training.mask_of(config.dataloader))
    return replace(config, parallelism=parallelism, training=training)


@contextmanager
def rank_files(folder: Path, rank: int, *, logs: bool) -> Iterator[None]:
    """Have a rank write what each has of its own in the run's folder, on request its log, while the block runs; the
    first writes the run's events.

    Raises `UserError` where that cannot be written.
    """
    with ExitStack() as files:
        with needed(folder, ANOTHER):
            if logs:
                files.enter_context(log_to(folder / "logs" / f"rank-{rank}.log"))
            keep_traces_in(folder)
            if rank == 0:
                files.enter_context(events_to(folder / EVENTS))
        yield


def write_config(folder: Path, text: str) -> None:
    """Write `config.json`, which tells what the run is, before its first step. Raises `UserError` when it cannot."""
    with needed(folder, ANOTHER):
        replace_file(folder / "config.json", text.encode())


def config_text(config: Any, device: torch.device) -> str:
    """What config.json says of a run on `device`, with absolute paths. That settings might change when it went on is of
    that one time, and not said."""
    checkpoint = replace(config.checkpoint, allow_config_change=False)
    stated = replace(resolved(config, device), checkpoint=checkpoint, dump_folder=absolute(config.dump_folder))
    return to_json(located(stated))


def _is_ours(folder: Path, environ: Mapping[str, str]) -> bool:
    launch, known = launch_id(environ), folder / LAUNCH
    return launch is not None and known.exists() and known.read_bytes() == launch.encode()


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
