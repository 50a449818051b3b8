"""A prepared corpus: the documents of a source, tokenised once, split, and kept in a cache of memory-mapped files."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config.configurable import Configurable, range_problems
from core.config.errors import UserError
from core.config.record import absolute, located, to_dict
from core.data import integrity, shards
from core.data.bad_lines import OnBadLine
from core.data.dataset import absolute_dataset, absolute_word, open_source
from core.data.preparation import write_splits
from core.data.rows import RowReader
from core.data.sampling import SPLITS, Split
from core.data.shards import DamagedError, TokenManifest, TokenStream, json_digest
from core.data.source import Source
from core.data.staging import staging_folder
from core.data.text_files import LINE_BYTES, Format
from core.data.workers import SectionEncoder
from core.runtime.disk import flush
from core.runtime.units import rate

log = logging.getLogger("armature")

LEAST_SECTION = 1000
"""Shorter sections would cut through words that a tokenizer joins."""
_ANOTHER_PLACE = "choose another place with cache_folder"


class Corpus(Configurable):
    """The tokenised documents of a source, prepared when they are first asked for and found in the cache from then on.

    The cache is keyed by everything that the tokens depend on: the source and its fingerprint (for files their sizes
    and times of change), the tokenizer, the split. A preparation writes beside its place and is moved there complete,
    so that one that is interrupted leaves nothing that looks complete, and is continued where it was; of two at once
    either may win. What the
    cache holds is compared with what was written (`core.data.integrity`), and prepared again where it is damaged.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dataset: str | list[str] | Source.Config = "stdlib"
        """stdlib (the running Python's standard library), a file, folder or glob pattern (.txt, .md, .jsonl, .json,
        .csv, .tsv, .parquet, .arrow; also .gz, .zst, .xz, .bz2), or hf:NAME[:CONFIG][@SPLIT][#REVISION]; or several of
        these, read one behind the other; in a recipe also the Config of a `Source`."""
        format: Format | None = None
        """What all the files are, whatever their names say; None goes by their names."""
        text_field: str = "text"
        """The field of a line, or column of a table, that holds the text; `a.b` is `b` inside of `a`."""
        on_bad_line: OnBadLine = "error"
        """Whether an unreadable line (bad JSON or UTF-8, no text) ends the run or is left out and counted."""
        section_characters: int | None = None
        """Longer documents are read and tokenised in sections of at most so many characters, cut at a blank line where
        there is one, and stay one document. None is 131,072 of a text file, 1,048,576 of any other document."""
        validation_fraction: float = 0.02
        """Share of the documents held out for validation; 0 holds none out."""
        cache_folder: str | None = None
        """Where tokenised text is kept; None is $XDG_CACHE_HOME/armature, or ~/.cache/armature. With --dataloader.mode
        streaming none is kept."""

        processes: int | None = None
        """Processes that tokenise; None is one for each core where there is much text. The tokens are the same."""

        def places(self) -> dict[str, Any]:
            return {"dataset": absolute_dataset(self.dataset), "cache_folder": absolute(self.cache_folder)}

        def problems(self) -> Iterator[tuple[str, str]]:
            """A share that is none, and settings of lines where a source has its own."""
            if not 0 <= self.validation_fraction < 1:
                yield "validation_fraction", f"must be at least 0 and below 1, not {self.validation_fraction}"
            yield from range_problems(self, processes=1024)
            if self.section_characters is not None and not LEAST_SECTION <= self.section_characters <= LINE_BYTES:
                said = f"{self.section_characters:,} must be from {LEAST_SECTION:,} to {LINE_BYTES:,}"
                yield "section_characters", f"section_characters {said}: leave it out for the usual ones"
            words = [self.dataset] if isinstance(self.dataset, str) else self.dataset
            if words == []:
                yield "dataset", "names nothing to read: give stdlib, a file, a folder, a glob pattern or hf:NAME"
            others = not isinstance(words, list) or any(word.startswith(("hf:", "stdlib")) for word in words)
            if self.format and others:
                yield "format", f"format {self.format} is of files, and dataset names none: leave it out"
            usual = (type(self).__dataclass_fields__["text_field"].default, "error", None)
            if not isinstance(words, list) and (self.text_field, self.on_bad_line, self.section_characters) != usual:
                message = "a Config has text_field, on_bad_line and section_characters of its own, if any: set those"
                yield "dataset", message

    def __init__(
        self, config: Config, *, tokenizer: SectionEncoder, reader: RowReader | None = None, verify: bool = True
    ) -> None:
        """`reader` says what is read of a row, where that is no text; `verify` is false on ranks that follow another
        one of their machine, which has compared every byte."""
        c = config
        source = open_source(c.dataset, c.text_field, c.on_bad_line, c.format, c.section_characters)
        if reader is not None:
            source.read_rows_by(reader)
        if isinstance(config.dataset, str):
            stated: Any = _printable(absolute_word(config.dataset))
            title = Path(config.dataset).name
        elif isinstance(config.dataset, list):
            stated = [_printable(absolute_word(word)) for word in config.dataset]
            title = f"{Path(config.dataset[0]).name}-and-{len(stated) - 1}-more"
        else:
            stated, title = to_dict(located(config.dataset)), type(source).__name__
        self._made_from = {
            "format": shards.FORMAT,
            "dataset": stated,
            "text_field": config.text_field,
            "on_bad_line": config.on_bad_line,
            "validation_fraction": config.validation_fraction,
            "tokenizer": tokenizer.fingerprint,
            "source": json_digest(source.fingerprint()),
            **({"file_format": config.format} if config.format else {}),
            **({"section_characters": c.section_characters} if c.section_characters else {}),
        }
        name = re.sub(r"\W+", "-", f"{title[:40]}-{json_digest(self._made_from)[:16]}").strip("-")
        self.folder = _cache_folder(config.cache_folder) / "corpora" / name
        self.name = source.name
        self._verify, self._vocab_size, self._processes = verify, tokenizer.vocab_size, config.processes
        self.manifest: TokenManifest = self._find() or self._prepare(source, tokenizer, config.validation_fraction)

    def split(self, split: Split) -> TokenStream:
        """The tokens of one split."""
        return TokenStream.map(self.folder, self.manifest, split)

    def describe(self, split: Split) -> str:
        """One line: how much the split holds, and where it lies."""
        extent = self.manifest.splits[split]
        long = extent.sections > extent.documents
        sections = f" in {extent.sections:,} sections cut at blank lines" if long else ""
        size = f"{extent.documents:,} documents{sections}, {rate(extent.tokens)} tokens ({split})"
        return f"{self.name}: {size}, cached in {self.folder}"

    def _find(self) -> TokenManifest | None:
        """What the cache holds, or None with a warning where that is damaged."""
        try:
            return self._read()
        except DamagedError as damage:
            if isinstance(damage.__cause__, PermissionError):
                raise UserError(f"cannot read {self.folder}: {damage}; {_ANOTHER_PLACE}") from damage
            if os.path.lexists(self.folder):
                log.warning("the prepared corpus %s is damaged (%s): it is prepared again", self.folder, damage)
            return None

    def _read(self) -> TokenManifest:
        """What the cache holds; DamagedError where that is not what was written there for these settings."""
        manifest = shards.read_token_manifest(self.folder)
        same = (manifest.made_from, manifest.vocab_size) == (self._made_from, self._vocab_size)
        if not same or manifest.splits.keys() != set(SPLITS):
            raise DamagedError("it was made from something else")
        integrity.check_files(self.folder, manifest, hashes=self._verify)
        return manifest

    def _prepare(self, source: Source, tokenizer: SectionEncoder, fraction: float) -> TokenManifest:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with staging_folder(self.folder) as staging:
                complete = staging / "complete"
                complete.mkdir(exist_ok=True)
                splits, files = write_splits(complete, source, tokenizer, fraction, self._processes)
                TokenManifest(
                    made_from=self._made_from,
                    vocab_size=tokenizer.vocab_size,
                    splits=splits,
                    shard_tokens=shards.SHARD_TOKENS,
                    files=files,
                ).write(complete)
                self._publish(complete, staging)
            return self._read()
        except DamagedError as damage:
            raise UserError(
                f"{self.folder} was prepared, and other bytes are read there than were written ({damage}): "
                f"{_ANOTHER_PLACE}"
            ) from damage
        except OSError as error:
            raise UserError(
                f"cannot keep the tokenised corpus in {self.folder.parent}: {error}; {_ANOTHER_PLACE}"
            ) from error

    def _publish(self, complete: Path, staging: Path) -> None:
        """Move a complete folder to its place, unless another process has done so; a damaged one there makes way."""
        while True:
            try:
                complete.rename(self.folder)
                return flush(self.folder.parent)
            except OSError:
                if not os.path.lexists(self.folder):
                    raise
            with suppress(FileNotFoundError):  # another process was quicker
                there = self.folder.lstat().st_ino
                try:
                    self._read()
                    return
                except DamagedError:
                    if self.folder.lstat().st_ino == there:
                        self.folder.rename(staging / f"damaged-{there}")


def _printable(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def _cache_folder(chosen: str | None) -> Path:
    if chosen is not None:
        return Path(os.path.expanduser(chosen)).absolute()
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError("no home folder to keep a cache in: choose a place with cache_folder") from error
    return home / "armature"
