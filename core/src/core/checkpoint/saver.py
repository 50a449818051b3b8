"""Saves and loads the state of a run. Every method is a collective: all ranks call it.

A save may end at any instruction: by a kill, a full disk, a lost machine. What must hold is that a folder called
`step-N` is a whole checkpoint, always, and that the ones before are untouched until it is. So:

1. All ranks write their pieces into `step-N.tmp`, which nothing reads; each file is flushed to the disk, read back,
   compared and summed up: what a disk returns counts, not what was handed to it.
2. The first rank, when all have succeeded, writes `manifest.json` with the size and sums of every file, and last its
   own hash.
3. The folder gets its name: one rename, which is there or not, and a flush of the folder above it. An object store has
   no such rename; there the manifest is moved last, and a folder without one is no checkpoint.
4. Only then are older checkpoints removed, and those under another name first, so that a removal that is cut off leaves
   no half of a `step-M`.

A run that goes on takes the newest `step-N` whose files are what its manifest says, tells why it passes over another,
and removes what is called `.tmp`. An error of one rank is raised on all: none goes on alone.
"""

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EIO
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any, Literal, cast

import torch
from torch import Tensor

from core.checkpoint.find import Found, all_problems, find_checkpoint
from core.checkpoint.index import NAMES
from core.checkpoint.manifest import (
    COMPANIONS,
    CONFIG_FILE,
    MANIFEST,
    Damaged,
    Manifest,
    Progress,
    Written,
    read_manifest,
    write_manifest,
)
from core.checkpoint.retention import Removals, to_remove
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import seen_from, steps_in
from core.config.errors import UserError, at_most
from core.runtime.activity import working
from core.runtime.log import event
from core.runtime.ranks import Ranks
from core.runtime.units import size_text

log = logging.getLogger("armature")

MOST_DIFFERENCES = 20
"""So many problems are listed."""
SaveKind = Literal["full", "model"]
GROWING = ".tmp"
"""End of the name of a checkpoint that is not whole yet."""


class Saver:
    """The checkpoints of one run.

    `step-N` is written as `step-N.tmp`, flushed, read back, given a manifest, and renamed; nothing else bears that
    name. What was left half-written is removed when the run goes on.
    """

    def __init__(
        self,
        settings: Checkpoint,
        ranks: Ranks,
        *,
        run_folder: Path,
        config: str,
        export: Callable[[Found, Path], None],
    ) -> None:
        """`config` is the text of `config.json`; `export` writes weights that were saved as a Hugging Face folder."""
        self.settings, self.ranks, self.config, self.export = settings, ranks, config, export
        self.companions: Mapping[str, bytes] = {}
        """Files that go along with the weights, by name; the first rank writes them into every checkpoint."""
        self.run_folder, self.storage = run_folder, settings.storage(run_folder)
        self._removals = Removals(self.storage)
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        self._stager: Any = None

    def check_writable(self) -> None:
        """Raise `UserError` where some rank cannot write to the place of the checkpoints."""
        if not self.settings.saves:
            return
        problem = ""
        try:
            self.storage.check_writable()
        except OSError as error:
            problem = f"{error.strerror or error} (rank {self.ranks.rank})"
        if problems := [problem for problem in self.ranks.gather(problem) if problem]:
            raise UserError(
                f"no checkpoint can be written in {self.storage}: "
                f"{', '.join(at_most(MOST_DIFFERENCES, problems))}; choose another "
                "with --checkpoint.folder, one that all ranks can write to"
            )

    def find(self) -> Found | None:
        """The checkpoint that the run goes on from; None for a run that begins. Errors as in `core.checkpoint.find`."""
        return find_checkpoint(self.settings, self.storage, self.ranks) if self.settings.enable else None

    def load(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors of this rank, of any shape, whatever layout wrote them.

        Raises `UserError`, before any is filled, for a tensor that is not there or has another shape, and for a weight
        there that no rank has.
        """
        from core.checkpoint.pieces import load_tensors  # loads torch.distributed.tensor: seconds

        index = found.tensors()
        wrong = [f"{name} is missing" for name in tensors if name not in index]
        wrong += [
            f"{name} has shape {list(index[name].shape)}, here {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in index and index[name].shape != tuple(tensor.shape)
        ]
        wrong += [
            f"{name} is stored as {NAMES[index[name].dtype]}, here it is {NAMES.get(tensor.dtype, tensor.dtype)}"
            for name, tensor in tensors.items()
            if name in index and index[name].dtype.is_floating_point != tensor.is_floating_point()
        ]
        gathered = self.ranks.gather((wrong, list(tensors)))
        known = {name for _, names in gathered for name in names}
        lines = {line for wrong, _ in gathered for line in wrong}
        kinds = {name.partition(".")[0] for name in known} - {"random"}
        lines |= {f"{name} is unknown here" for name in index.keys() - known if name.partition(".")[0] in kinds}
        if lines:
            raise UserError("\n  ".join([f"{found} does not fit this run:", *at_most(MOST_DIFFERENCES, sorted(lines))]))
        load_tensors(tensors, found.storage, found.folder, index, self.ranks.group)

    def due(self, step: int, *, last: bool) -> bool:
        """Whether this step, perhaps the last of the run or of this process, is saved."""
        c = self.settings
        return c.saves and (last or step % c.interval == 0 or (step == 1 and c.enable_first_step_checkpoint))

    def save(self, progress: Progress, tensors: Mapping[str, Tensor], *, kind: SaveKind, wait: bool) -> None:
        """Save a step, tensors of any shape; with an `async_mode`, unless told to `wait`, writing goes on afterwards.

        An earlier one must have been waited for. Raises `UserError` for what keeps this one from being written.
        """
        assert self._running is None, "an earlier save is still going on: `wait` for it"
        if kind == "model":
            tensors = {name: self._exported(tensor) for name, tensor in tensors.items() if name.startswith("model.")}
        if self.settings.async_mode == "disabled" or wait:
            self._write(progress, tensors, kind)
        else:
            self._running = self._pool.submit(self._write, progress, self._copy(tensors), kind)

    @property
    def failed(self) -> bool:
        """Whether a save behind the run went wrong on this rank; `wait` raises why. (No collective.)"""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Wait for a save behind the run, and raise what went wrong with it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints of later steps than `after`, which the run will come to again, and remove what was
        left half-written."""
        if self.settings.saves:
            self.ranks.first(lambda: self._clear(after))

    def _exported(self, tensor: Tensor) -> Tensor:
        """A weight in the type to export; a buffer as it is."""
        is_weight = isinstance(tensor, torch.nn.Parameter)
        return tensor.detach().to(getattr(torch, self.settings.export_dtype)) if is_weight else tensor

    def _copy(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of this rank in memory of the host that training does not touch."""
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            pinned = self.settings.async_mode == "async_with_pinned_mem"
            options = {"use_pinned_memory": pinned, "use_non_blocking_copy": pinned}
            self._stager = DefaultStager(StagingOptions(**options, use_shared_memory=False, use_async_staging=False))
        return cast(dict[str, Tensor], self._stager.stage(dict(tensors)))

    @working("saving a checkpoint")
    def _write(self, progress: Progress, tensors: Mapping[str, Tensor], kind: SaveKind) -> None:
        from core.checkpoint.pieces import save_tensors  # loads torch.distributed.tensor: seconds

        folder, growing = f"step-{progress.step}", f"step-{progress.step}{GROWING}"
        try:
            written = self.ranks.first(lambda: self._begin(growing))
            written |= save_tensors(tensors, self.storage, growing, self.ranks.group)
            written = self.ranks.first(lambda: written)
            if not self.storage.is_local and (wrong := all_problems(self.storage, growing, written, self.ranks)):
                raise OSError(EIO, "; ".join(wrong))
            made = Manifest(
                progress=progress, kind=kind, world_size=self.ranks.size, versions=writer_versions(), files=written
            )
            self.ranks.first(lambda: self._publish(growing, folder, made))
        except OSError as error:
            place = "".join(f" {note}" for note in getattr(error, "__notes__", []))
            raise UserError(
                f"{self.storage}/{folder} could not be saved{place}: {error.strerror or error}. The checkpoints before "
                "it are as they were"
            ) from error

    def _begin(self, growing: str) -> dict[str, Written]:
        """Make the folder of a new checkpoint, with the configuration in it.

        A place that was removed since the run began is not made again, for nobody would hold its lock.
        """
        if self.storage.is_local:
            os.stat(self.storage.root)
        if self.storage.exists(growing):
            self._removals.remove(growing)
        self.storage.make(growing)
        if self.companions:
            self.storage.make(f"{growing}/{COMPANIONS}")
        beside = {f"{COMPANIONS}/{name}": content for name, content in self.companions.items()}
        written = {}
        for name, content in {CONFIG_FILE: self.config.encode(), **beside}.items():
            with self.storage.create(f"{growing}/{name}") as file:
                file.write(content)
            written[name] = Written(file.n_bytes, file.sums())
        if self.companions:
            self.storage.flush(f"{growing}/{COMPANIONS}")
        return written

    def _publish(self, growing: str, folder: str, made: Manifest) -> None:
        """Make a checkpoint of what was written; once it is one, nothing that goes wrong is an error of this save."""
        c = self.settings
        if c.last_save_in_hf and made.kind == "model":
            self.export(Found(self.storage, growing, made), Path(self.storage.path(f"{growing}/hf")))
            for name in self.storage.names(f"{growing}/hf"):
                file = f"{growing}/hf/{name}"
                made.files[f"hf/{name}"] = Written(self.storage.size(file), self.storage.sums(file))
        write_manifest(self.storage, growing, made)
        if self.storage.exists(folder):
            self._set_aside(made.progress.step)
        self.storage.rename(growing, folder, last=MANIFEST)
        n_bytes = sum(file.n_bytes for file in made.files.values())
        saved = event("checkpoint", made.progress.step)
        log.info(f"saved {seen_from(self.run_folder, f'{self.storage}/{folder}')} ({size_text(n_bytes)})", extra=saved)
        try:
            self._retain()
        except (OSError, UserError) as error:
            log.warning(f"no checkpoint was removed from {self.storage}: {error}; the next save tries again")

    def _retain(self) -> None:
        """Remove the checkpoints that no rule keeps."""
        c = self.settings
        losses = {step: self._validation_loss(step) for step in steps_in(self.storage)}
        for step in to_remove(
            losses, latest=c.keep_latest_k, every=c.keep_every, best=c.keep_best_k, pinned=frozenset(c.keep_steps)
        ):
            self._removals.remove(f"step-{step}")
        self._removals.remove_unfinished()

    def _validation_loss(self, step: int) -> float | None:
        try:
            return read_manifest(self.storage, f"step-{step}").progress.validation_loss
        except Damaged:
            return None

    def _clear(self, after: int) -> None:
        self._removals.remove_unfinished()
        for step in steps_in(self.storage):
            if step > after:
                self._set_aside(step)

    def _set_aside(self, step: int) -> None:
        """Give a checkpoint a name under which no run looks for it."""
        number = 1
        while self.storage.exists(aside := f"replaced-step-{step}-{number}"):
            number += 1
        self.storage.rename(f"step-{step}", aside, last=MANIFEST)
        log.warning(f"{self.storage}/step-{step} is now {aside}: the run comes to that step again")


def writer_versions() -> dict[str, str]:
    """The versions of what writes a checkpoint."""
    try:
        core = metadata.version("armature-core")
    except metadata.PackageNotFoundError:
        core = "not installed"
    return {"armature-core": core, "torch": torch.__version__, "python": python_version()}
