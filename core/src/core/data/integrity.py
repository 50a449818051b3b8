"""Whether the files of a prepared corpus hold what was written: hashes once, the order of document starts always.

The hash of a file is compared when it is first used, and remembered in verified.json beside it by the file's size,
times of change and number (inode), which no ordinary program can change a byte without changing. Where that cannot be
written, hashes are compared at the start of every run. Ids are compared with the vocabulary in the same pass, and
again in every window that is read (`TokenStream.windows`).
"""

import hashlib
import json
import logging
import stat
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np

from core.config.errors import UserError
from core.config.json_file import read_json, typed
from core.data.shards import STARTS, VERIFIED, DamagedError, TokenManifest, token_type
from core.runtime.activity import advance
from core.runtime.cores import n_cores

log = logging.getLogger("armature")

_CHUNK_BYTES = 2**24
_THREADS = 8
_SETTLED_NS = 2_000_000_000
"""A file that has changed later than this before it is read could change again without a new time of change."""
_LONG_BYTES = 2**32

Stamp: TypeAlias = list[int]
_known: dict[str, Stamp] = {}
"""What this process has verified, by path: validation text is opened after training text, and may be in a folder that
cannot be written."""


def check_files(folder: Path, manifest: TokenManifest, *, hashes: bool) -> None:
    """DamagedError unless the files are those of the manifest: their sizes and the order of the document starts, and
    if `hashes` every byte of a file that was not verified before."""
    sizes = manifest.sizes()
    stamps = {name: _stamp(folder, name, size) for name, size in sizes.items()}
    if hashes:
        verified = _remembered(folder)
        new = [name for name in sizes if stamps[name] not in (verified.get(name), _known.get(str(folder / name)))]
        _verify(folder, manifest, new, sum(sizes[name] for name in new))
        _remember(folder, verified, {name: stamps[name] for name in new})
    for split, extent in manifest.splits.items():
        if extent.documents:
            _check_starts(folder / f"{split}.starts", extent.tokens)


def _stamp(folder: Path, name: str, size: int) -> Stamp:
    try:
        found = (folder / name).stat()
    except OSError as error:
        raise DamagedError(f"{name}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{name} is no file")
    if found.st_size != size:
        raise DamagedError(f"{name} has {found.st_size:,} bytes instead of {size:,}")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _remembered(folder: Path) -> dict[str, Stamp]:
    """What was verified before; nothing where that cannot be read: then it is verified again."""
    try:
        return typed(read_json(folder / VERIFIED), dict[str, list[int]], VERIFIED)
    except UserError:
        return {}


def _remember(folder: Path, verified: dict[str, Stamp], new: dict[str, Stamp]) -> None:
    settled = {name: stamp for name, stamp in new.items() if max(stamp[1:3]) < time.time_ns() - _SETTLED_NS}
    if not settled:
        return
    _known.update({str(folder / name): stamp for name, stamp in settled.items()})
    unfinished = folder / f"{VERIFIED}.{uuid.uuid4().hex[:12]}"
    try:
        unfinished.write_text(json.dumps({**verified, **settled}), encoding="utf-8")
        unfinished.replace(folder / VERIFIED)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        log.info("%s cannot be written (%s): its files are verified at the start of every run", folder, error.strerror)


def _verify(folder: Path, manifest: TokenManifest, names: Iterable[str], n_bytes: int) -> None:
    if n_bytes >= _LONG_BYTES:
        log.info("verifying %s GB of tokens in %s, once", f"{n_bytes / 1e9:,.1f}", folder)
    with ThreadPoolExecutor(min(_THREADS, n_cores())) as threads:
        for _ in threads.map(lambda name: _verify_file(folder / name, manifest), names):
            pass


def _verify_file(path: Path, manifest: TokenManifest) -> None:
    dtype = STARTS if path.suffix == ".starts" else token_type(manifest.vocab_size)
    limit = manifest.vocab_size if path.suffix == ".tokens" else None
    hashed = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hashed.update(chunk)
                advance()
                if limit is not None and (largest := int(np.frombuffer(chunk, dtype).max())) >= limit:
                    raise DamagedError(f"{path.name} holds the id {largest:,}, the vocabulary ends at {limit - 1:,}")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from error
    if hashed.hexdigest() != manifest.files[path.name]:
        raise DamagedError(f"{path.name} holds other bytes than were written")


def _check_starts(path: Path, n_tokens: int) -> None:
    last: int | None = None
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                starts = np.frombuffer(chunk, STARTS)
                if (starts[0] != 0 if last is None else starts[0] < last) or (starts[1:] < starts[:-1]).any():
                    raise DamagedError(f"{path.name} does not ascend from 0")
                last = int(starts[-1])
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from error
    if last is not None and last > n_tokens:
        raise DamagedError(f"{path.name} goes up to {last:,}, the split has {n_tokens:,} tokens")
