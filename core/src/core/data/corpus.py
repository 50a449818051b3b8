"""A prepared corpus: the documents of a source, tokenised once, split, and kept in a cache of memory-mapped files."""

import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.data import shards
from core.data.sampling import held_out
from core.data.shards import DamagedError, Manifest, SplitWriter, TokenStream
from core.data.source import Source, open_source
from core.data.text_files import OnBadLine
from core.data.tokenizer import Tokenizer
from core.runtime.log import LOGGER

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_BATCH_CHARACTERS = 2**20
_LOG_INTERVAL_S = 10.0
_LIVE_INTERVAL_S = 0.2


class Corpus(Configurable):
    """The tokenised documents of a source, prepared when they are first asked for and found in the cache from then on.

    The cache is keyed by everything that the tokens depend on: the source and its fingerprint (for files their sizes
    and times of change), the tokenizer, the split. A preparation writes beside its place and is moved there complete,
    so that one that is interrupted leaves nothing that looks complete, and of two at once either may win.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dataset: str = "stdlib"
        """stdlib (the running Python's standard library), a file, folder or glob pattern (.txt, .jsonl, also .gz), or
        hf:NAME[:CONFIG][@SPLIT]."""
        text_field: str = "text"
        """The field of a .jsonl line or dataset row that holds the text."""
        on_bad_line: OnBadLine = "error"
        """Whether an unreadable line (bad JSON or UTF-8, no text) ends the run or is left out and counted."""
        validation_fraction: float = 0.02
        """Share of the documents held out for validation; 0 holds none out."""
        cache_folder: str | None = None
        """Where tokenised text is kept; None is $XDG_CACHE_HOME/armature, or ~/.cache/armature."""

        def problems(self) -> Iterator[tuple[str, str]]:
            """A share that is none."""
            if not 0 <= self.validation_fraction < 1:
                yield "validation_fraction", f"must be at least 0 and below 1, not {self.validation_fraction}"

    def __init__(self, config: Config, *, tokenizer: Tokenizer) -> None:
        source = open_source(config.dataset, config.text_field, config.on_bad_line)
        made_from = {
            "format": shards.FORMAT,
            "dataset": config.dataset,
            "text_field": config.text_field,
            "on_bad_line": config.on_bad_line,
            "validation_fraction": config.validation_fraction,
            "tokenizer": tokenizer.fingerprint,
            "source": digest(source.fingerprint()),
        }
        name = re.sub(r"\W+", "-", f"{Path(config.dataset).name[:40]}-{digest(made_from)[:16]}").strip("-")
        self.folder = _cache_folder(config.cache_folder) / "corpora" / name
        self.name = source.name
        self.manifest = self._find() or self._prepare(source, tokenizer, made_from, config.validation_fraction)

    def split(self, split: Split) -> TokenStream:
        """The tokens of one split."""
        return TokenStream.map(self.folder, self.manifest, split)

    def describe(self, split: Split) -> str:
        """One line: how much the split holds, and where it lies."""
        extent = self.manifest.splits[split]
        size = f"{extent.documents:,} documents, {extent.tokens / 1e6:,.1f} M tokens ({split})"
        return f"{self.name}: {size}, cached in {self.folder}"

    def _find(self) -> Manifest | None:
        """What the cache holds, or None with a warning where that is damaged."""
        try:
            return shards.read_manifest(self.folder)
        except DamagedError as damage:
            if os.path.exists(self.folder):
                LOGGER.warning("the prepared corpus %s is damaged (%s): it is prepared anew", self.folder, damage)
            return None

    def _prepare(self, source: Source, tokenizer: Tokenizer, made_from: dict[str, Any], fraction: float) -> Manifest:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            for left in self.folder.parent.glob(f"{self.folder.name}.*"):
                LOGGER.warning(
                    "%s is left of an interrupted preparation: remove it, unless another process is at work there", left
                )
            unfinished = self._beside()
            unfinished.mkdir()
            try:
                splits = _write(unfinished, source, tokenizer, fraction)
                manifest = Manifest(
                    made_from=made_from,
                    vocab_size=tokenizer.vocab_size,
                    splits=splits,
                    shard_tokens=shards.SHARD_TOKENS,
                )
                manifest.write(unfinished)
                self._publish(unfinished)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"cannot keep the tokenised corpus in {self.folder.parent}: {error}; "
                "choose another place with cache_folder"
            ) from error
        return manifest

    def _beside(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:12]}")

    def _publish(self, complete: Path) -> None:
        """Move a complete folder to its place, unless another process has done so; a damaged one there makes way."""
        while True:
            try:
                complete.rename(self.folder)
                return shards.sync_folder(self.folder.parent)
            except OSError:
                if not os.path.exists(self.folder):
                    raise
            try:
                shards.read_manifest(self.folder)
                return
            except DamagedError:
                damaged = self._beside()
            with suppress(FileNotFoundError):  # another process was quicker
                self.folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)


def digest(data: Any) -> str:
    """The hash of data that JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _cache_folder(chosen: str | None) -> Path:
    if chosen is not None:
        return Path(chosen).expanduser().absolute()
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError("no home folder to keep a cache in: choose a place with cache_folder") from error
    return home / "armature"


def _write(folder: Path, source: Source, tokenizer: Tokenizer, fraction: float) -> dict[str, shards.Extent]:
    """Tokenise all documents into the files of both splits; gives the extent of each."""
    size = shards.SHARD_TOKENS
    writers = {split: SplitWriter(folder, split, tokenizer.vocab_size, size) for split in SPLITS}
    try:
        with Progress(source.name) as progress:
            first = 0
            for texts in batches(source.documents()):
                sizes = np.array([len(text.encode()) for text in texts])
                encoded = tokenizer.encode_documents(texts)
                validation = held_out(first, len(texts), fraction)
                for split, chosen in (("train", ~validation), ("validation", validation)):
                    writers[split].write([encoded[i] for i in np.flatnonzero(chosen)], int(sizes[chosen].sum()))
                first += len(texts)
                progress.add(len(texts), int(sizes.sum()))
    finally:
        for writer in writers.values():
            writer.close()
    return {split: writer.extent for split, writer in writers.items()}


def batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """The documents in lists of about a million characters, so that many cores may encode one."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Progress:
    """Says how far long work is: one live line on a terminal, otherwise a logged line every ten seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.documents = self.bytes = 0
        self._live = sys.stderr.isatty()
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def add(self, documents: int, n_bytes: int) -> None:
        """Count documents and bytes of text as done."""
        self.documents += documents
        self.bytes += n_bytes
        now = time.monotonic()
        if now - self._said < (_LIVE_INTERVAL_S if self._live else _LOG_INTERVAL_S):
            return
        self._said = now
        megabytes = self.bytes / 1e6
        rate = megabytes / (now - self._started)
        line = f"tokenising {self.name}: {self.documents:,} documents, {megabytes:,.1f} MB, {rate:.1f} MB/s"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]}\033[K", end="", file=sys.stderr, flush=True)
        else:
            LOGGER.info(line)
