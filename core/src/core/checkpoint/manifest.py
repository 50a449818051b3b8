"""What a checkpoint says of itself: which step it is of, what is in it, and the size and sums of every file."""

import hashlib
import json
import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_type_hints

from core.checkpoint.storage import Storage
from core.checkpoint.sums import CRC32, OF_LAYOUT
from core.config.errors import UserError, at_most
from core.config.json_file import parse_json, typed

LAYOUT = 3
"""Version of the layout of a checkpoint that is written here, and the newest that can be read. Layouts differ in the
sums of files, of which `core.checkpoint.sums` has the algorithms."""
MANIFEST = "manifest.json"
CONFIG_FILE = "config.json"
TENSORS = "tensors.json"
COMPANIONS = "companions"
"""The folder in a checkpoint of what goes along with its weights: a tokenizer, a license."""
DIGITS = re.compile("[0-9a-f]+")
FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
"""The name of a file in a checkpoint, or in a folder of it."""
SaveKind = Literal["full", "model"]
PARTS = {
    "layout": int,
    "kind": SaveKind,
    "world_size": int,
    "versions": dict[str, str],
    "progress": dict[str, Any],
    "files": dict[str, dict[str, Any]],
}
"""What stands in a manifest beside its own hash."""


class Damaged(Exception):
    """Why a checkpoint is not whole."""


class Written(NamedTuple):
    """A file, and what it was when it was written."""

    n_bytes: int
    sums: str
    """As a manifest states them, by the name of their algorithm."""


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
    observers: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the observers of the run remember."""
    spikes: dict[str, list[float]] = field(default_factory=dict)
    """Losses and gradient norms that the next steps are compared with, and how many steps were left out."""


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What stands in `manifest.json`, the last file of a checkpoint to be written."""

    progress: Progress
    kind: SaveKind
    """All that a run goes on from, or the weights alone."""
    world_size: int
    versions: dict[str, str]
    """What wrote it."""
    files: dict[str, Written]
    layout: int = LAYOUT


def write_manifest(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Write `manifest.json`, which makes a folder a checkpoint."""
    files = {name: {"n_bytes": written.n_bytes, CRC32.name: written.sums} for name, written in manifest.files.items()}
    said = {**asdict(manifest), "files": files}
    with storage.create(f"{folder}/{MANIFEST}") as file:
        file.write((json.dumps({**said, "digest": manifest_digest(said)}, indent=1) + "\n").encode())
    storage.flush(folder)


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """What a checkpoint says of itself. Raises `Damaged` when it says nothing sensible, `UserError` when it was
    written in a newer layout than is known here; `layout` and `digest` mean the same in all."""
    try:
        said = parse_json(storage.read(f"{folder}/{MANIFEST}"), MANIFEST)
    except FileNotFoundError as error:
        raise Damaged(f"there is no {MANIFEST}: it was never finished") from error
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise Damaged(str(error)) from error
    if said.pop("digest", None) != manifest_digest(said):
        raise Damaged(f"{MANIFEST} was changed after it was written")
    layout = said.get("layout")
    if type(layout) is int and layout > LAYOUT:
        raise UserError(
            f"{storage}/{folder} was written in layout {layout}, and this version reads up to {LAYOUT}: update "
            "armature-core"
        )
    try:
        return manifest_of(said)
    except UserError as error:
        raise Damaged(str(error)) from error


def manifest_of(said: dict[str, Any]) -> Manifest:
    """A manifest from what stands in its file; raises `UserError` for what cannot be one."""
    said = entries(said, PARTS, MANIFEST, needed=set(PARTS))
    progress = Progress(**entries(said["progress"], get_type_hints(Progress), f"{MANIFEST}: progress"))
    if said["layout"] not in OF_LAYOUT:
        raise UserError(f"{MANIFEST} names layout {said['layout']}")
    algorithm = OF_LAYOUT[said["layout"]]
    types = {"n_bytes": int, algorithm.name: str}
    stated = {
        name: entries(file, types, f"{MANIFEST}: {name}", needed=set(types)) for name, file in said["files"].items()
    }
    files = {name: Written(file["n_bytes"], file[algorithm.name]) for name, file in stated.items()}
    numbers = {name: getattr(progress, name) for name in ("step", "tokens", "rows", "rows_per_step")}
    numbers |= {f"the size of {name}": file.n_bytes for name, file in files.items()}
    wrong = [f"{name} {number}" for name, number in numbers.items() if not 0 <= number < 2**63]
    wrong += [f"world_size {said['world_size']}"] if said["world_size"] < 1 else []
    wrong += [f"{name!r}, which is no file in the folder" for name in files if not FILE.fullmatch(name)]
    wrong += [
        f"{name} with a {algorithm.name} that is none"
        for name, file in files.items()
        if not (DIGITS.fullmatch(file.sums) and len(file.sums) == algorithm.n_digits(file.n_bytes))
    ]
    wrong += [f"no {name}" for name in (CONFIG_FILE, TENSORS) if name not in files]
    if wrong:
        raise UserError(f"{MANIFEST} names {'; '.join(at_most(5, wrong))}")
    return Manifest(**said | {"progress": progress, "files": files})


def entries(
    said: dict[str, Any], types: Mapping[str, Any], name: str, needed: Set[str] = frozenset()
) -> dict[str, Any]:
    """What is said of these fields, each of its type; raises `UserError` for a field that is missing or unknown."""
    wrong = [f"{each} is missing" for each in sorted(needed - said.keys())]
    wrong += [f"{each} is unknown" for each in sorted(said.keys() - types.keys())]
    if wrong:
        raise UserError(f"{name}: {', '.join(at_most(5, wrong))}")
    return {each: typed(value, types[each], f"{name}: {each}") for each, value in said.items()}


def manifest_digest(said: dict[str, Any]) -> str:
    """The hash of a manifest's other entries."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def file_problems(storage: Storage, folder: str, files: dict[str, Written], layout: int = LAYOUT) -> list[str]:
    """What is wrong with those files of a checkpoint of this layout; each is read once."""
    found, algorithm = [], OF_LAYOUT[layout]
    for name, written in files.items():
        try:
            n_bytes = storage.size(f"{folder}/{name}")
            if n_bytes != written.n_bytes:
                found.append(f"{name} has {n_bytes:,} bytes, not {written.n_bytes:,}")
            elif storage.sums(f"{folder}/{name}", algorithm) != written.sums:
                found.append(f"{name} has other bytes than were written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found
