"""Checkpoints that are there, and whole. What is given `ranks` is a collective of them."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint.index import StoredTensor, header_problems, read_index
from core.checkpoint.manifest import (
    CONFIG_FILE,
    LAYOUT,
    TENSORS,
    Damaged,
    Manifest,
    Written,
    file_problems,
    read_manifest,
)
from core.checkpoint.settings import Checkpoint
from core.checkpoint.storage import Storage, step_of, steps_in
from core.config.errors import UserError, at_most
from core.config.json_file import parse_json, read_json
from core.config.links import file_in
from core.runtime.activity import working
from core.runtime.ranks import Ranks

log = logging.getLogger("armature")


class Found(NamedTuple):
    """A checkpoint that was found whole. Whatever reads one reads it through this."""

    storage: Storage
    folder: str
    manifest: Manifest
    ema: bool = False
    """Whether means of weights over steps stand for the weights, where there are some."""

    def __str__(self) -> str:
        return f"{self.storage}/{self.folder}"

    def config(self) -> dict[str, Any]:
        """The configuration of the run that it is of, as data: another version may have written it."""
        return parse_json(self.storage.read(f"{self.folder}/{CONFIG_FILE}"), f"{self}/{CONFIG_FILE}")

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of it by name."""
        found = read_index(self.storage, self.folder, self.manifest.files)
        if not self.ema:
            return found
        return {name: found.get(f"optimizer.{name.removeprefix('model.')}.ema", found[name]) for name in found}

    def averaged(self) -> "Found":
        """The same with means of weights over steps in place of the weights. Raises `UserError` where it has none."""
        if not any(name.endswith(".ema") for name in self.tensors()):
            raise UserError(f"{self} has no means of weights over steps: train with --optimizer.ema_decay 0.999")
        return self._replace(ema=True)


def find_checkpoint(settings: Checkpoint, storage: Storage, ranks: Ranks) -> Found | None:
    """The checkpoint that a run goes on from; None for one that begins.

    Damaged ones are named and passed over. Raises `UserError` when none of those there is whole, when the one that was
    asked for is not, and when there must be one and is none.
    """
    found = sorted(ranks.first(lambda: steps_in(storage)), reverse=True)
    names = ", ".join(f"step-{step}" for step in found)
    if settings.resume == "never":
        if found:
            raise UserError(f"checkpoint.resume never, and {storage} holds {names}: choose another folder")
        return None
    if settings.load_step != -1:
        if settings.load_step not in found:
            raise UserError(f"checkpoint.load_step {settings.load_step}: {storage} holds {names or 'no checkpoint'}")
        try:
            return inspect(storage, f"step-{settings.load_step}", ranks)
        except Damaged as damage:
            raise UserError(f"{storage}/step-{settings.load_step} is damaged: {damage}") from damage
    if whole := first_whole(((storage, f"step-{step}") for step in found), ranks):
        return whole
    if found:
        raise UserError(f"no checkpoint in {storage} is whole ({names}): choose another folder to begin anew")
    if settings.resume == "must":
        raise UserError(f"checkpoint.resume must, and {storage} holds no checkpoint: use auto to begin anew")
    return None


def find_in(place: str, ranks: Ranks) -> Found:
    """The checkpoint that a folder is, or the newest whole one that it holds; raises `UserError` where none is."""
    there = ranks.first(lambda: list(candidates(place)))
    if len(there) == 1:
        ((storage, folder),) = there
        try:
            return inspect(storage, folder, ranks)
        except Damaged as damage:
            raise UserError(f"{storage}/{folder} is damaged: {damage}") from damage
    if whole := first_whole(there, ranks):
        return whole
    raise UserError(f"{place} holds no checkpoint that is whole")


def first_whole(places: Iterable[tuple[Storage, str]], ranks: Ranks) -> Found | None:
    """The first of these that is whole; those before it are named."""
    for storage, folder in places:
        try:
            return inspect(storage, folder, ranks)
        except Damaged as damage:
            log.warning(f"{storage}/{folder} is damaged and passed over: {damage}")
    return None


@working("verifying a checkpoint")
def inspect(storage: Storage, folder: str, ranks: Ranks) -> Found:
    """A checkpoint whose files are as they were written, and fit one another; raises `Damaged` for another."""
    manifest = ranks.first(lambda: read_manifest(storage, folder))
    if step_of(folder) not in (None, manifest.progress.step):
        raise Damaged(f"it is the checkpoint of step {manifest.progress.step} under another's name")
    if found := all_problems(storage, folder, manifest.files, ranks, manifest.layout):
        raise Damaged("; ".join(at_most(5, found)))
    mine = sorted(manifest.files)[ranks.rank :: ranks.size]
    wrong = [line for lines in ranks.gather(misfits(storage, folder, manifest, mine)) for line in lines]
    if wrong:
        raise Damaged("; ".join(at_most(5, sorted(set(wrong)))))
    return Found(storage, folder, manifest)


def misfits(storage: Storage, folder: str, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Where the index of a checkpoint is none, or these files hold other tensors than it names."""
    try:
        return header_problems(storage, folder, read_index(storage, folder, manifest.files), names)
    except (OSError, Damaged) as error:
        return [str(error)]


def all_problems(
    storage: Storage, folder: str, files: Mapping[str, Written], ranks: Ranks, layout: int = LAYOUT
) -> list[str]:
    """What is wrong with the files of a checkpoint of this layout; one rank reads each."""
    mine = {name: files[name] for name in sorted(files)[ranks.rank :: ranks.size]}
    return [line for lines in ranks.gather(file_problems(storage, folder, mine, layout)) for line in lines]


def candidates(place: str) -> Iterator[tuple[Storage, str]]:
    """The checkpoint that a folder is, under whatever name, or those that it holds as a run's folder or as one of
    checkpoints, the newest first."""
    place = place.rstrip("/") if "://" in place else os.path.abspath(place)
    parent, _, name = place.rpartition("/")
    if step_of(name) is not None or holds_tensors(place):
        yield Storage(parent or "/"), name
        return
    for inside in (Storage(place), checkpoints_of(place)):
        for step in reversed(steps_in(inside)):
            yield inside, f"step-{step}"


def holds_tensors(place: str) -> bool:
    """Whether a folder is a checkpoint, whole or not: a folder of weights that a run did not write has no such file."""
    try:
        return Storage(place).exists(TENSORS)
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror or error}") from error


def checkpoints_of(run_folder: str) -> Storage:
    """Where the run of a folder keeps its checkpoints on this machine, as its `config.json` says."""
    folder = Checkpoint().folder
    if "://" in run_folder:
        return Storage(f"{run_folder.rstrip('/')}/{folder}")
    if (file := file_in(run_folder, CONFIG_FILE)) is not None:
        stated = read_json(file).get("checkpoint")
        named = stated.get("folder") if isinstance(stated, dict) else None
        folder = named if isinstance(named, str) and "://" not in named else folder
    return Storage(Path(run_folder).absolute() / folder)
