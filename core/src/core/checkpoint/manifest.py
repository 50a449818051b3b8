"""What a checkpoint says of itself: which step it is of, what is in it, and the size and hash of every file."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from core.checkpoint.storage import Storage
from core.config.errors import UserError

LAYOUT = 1
"""Version of the layout of a checkpoint that is written here, and the newest that can be read."""
MANIFEST = "manifest.json"
CONFIG = "config.json"
TENSORS = "tensors.json"


class Damaged(Exception):
    """Why a checkpoint is not whole."""


class Written(NamedTuple):
    """A file, and what it was when it was written."""

    n_bytes: int
    sha256: str


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Updates that were made."""
    tokens: int = 0
    """Tokens that were read."""
    rows: int = 0
    """Rows of the training text that were read, over all ranks: the place in the data."""
    rows_per_step: int = 0
    places: list[dict[str, int]] = field(default_factory=list)
    """Where each data rank stands in a stream; empty for indexed text, where `rows` says all."""
    text: str = ""
    """Fingerprint of the text and of its tokenizer."""
    validation_loss: float | None = None
    """That of the step, if it was measured."""


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What stands in `manifest.json`, the last file of a checkpoint to be written."""

    progress: Progress
    kind: Literal["full", "model"]
    """All that a run goes on from, or the weights alone."""
    world_size: int
    versions: dict[str, str]
    """What wrote it."""
    files: dict[str, Written]
    layout: int = LAYOUT


def write_manifest(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Write `manifest.json`, which makes a folder a checkpoint."""
    files = {name: written._asdict() for name, written in manifest.files.items()}
    said = {**asdict(manifest), "files": files}
    with storage.create(f"{folder}/{MANIFEST}") as file:
        file.write((json.dumps({**said, "digest": digest(said)}, indent=1) + "\n").encode())
    storage.flush(folder)


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """What a checkpoint says of itself. Raises `Damaged` when it says nothing sensible, `UserError` when it was
    written in a newer layout than is known here; `layout` and `digest` mean the same in all."""
    try:
        said = json.loads(storage.read(f"{folder}/{MANIFEST}"))
        layout, before = int(said["layout"]), said.pop("digest")
    except FileNotFoundError as error:
        raise Damaged(f"there is no {MANIFEST}: it was never finished") from error
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error!r}") from error
    if before != digest(said):
        raise Damaged(f"{MANIFEST} was changed after it was written")
    if layout > LAYOUT:
        raise UserError(
            f"{storage}/{folder} was written in layout {layout}, and this version reads up to {LAYOUT}: update "
            "armature-core"
        )
    files = {name: Written(**written) for name, written in said.pop("files").items()}
    manifest = Manifest(progress=Progress(**said.pop("progress")), files=files, **said)
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            raise Damaged(f"{MANIFEST} names {name!r}, which is no file in the folder")
    return manifest


def digest(said: dict[str, Any]) -> str:
    """The hash of a manifest's other entries."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def problems(storage: Storage, folder: str, files: dict[str, Written]) -> list[str]:
    """What is wrong with those files of a checkpoint; each is read once."""
    found = []
    for name, written in files.items():
        try:
            n_bytes = storage.size(f"{folder}/{name}")
            if n_bytes != written.n_bytes:
                found.append(f"{name} has {n_bytes:,} bytes, not {written.n_bytes:,}")
            elif storage.digest(f"{folder}/{name}") != written.sha256:
                found.append(f"{name} has other bytes than were written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found
