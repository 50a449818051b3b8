"""The documents of a source written as tokens, in a journal so that a preparation that was interrupted continues."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.config.json_file import read_json
from core.data import shards
from core.data.bad_lines import BadLines
from core.data.merge import MergeItem, PartEnd, Reader, Tokens
from core.data.parts import PassCounts, Reached
from core.data.progress import ProgressLine
from core.data.sampling import SPLITS, Split, held_out
from core.data.sections import LeftOut, Section, grouped
from core.data.shards import Extent
from core.data.source import Source
from core.data.split_writer import SplitWriter
from core.data.staging import JOURNAL
from core.data.workers import Encoded, SectionEncoder
from core.runtime.disk import replace_file

log = logging.getLogger("armature")

JOURNAL_BYTES = 2**26
"""Text between two entries of the journal."""


class Piece(NamedTuple):
    """A section as it stands in its part of the source, and its tokens."""

    tokens: Tokens
    """Those of its batch."""
    number: int
    """Its number in the batch."""
    in_part: int
    """Its number in the part."""
    ids: np.ndarray

    @property
    def characters(self) -> int:
        return self.tokens.batch.characters[self.number]


class SplitFiles:
    """Both splits as they are written, how far that is, and what was left out."""

    def __init__(self, folder: Path, source: Source, encoder: SectionEncoder, fraction: float) -> None:
        self.folder, self.source, self.encoder, self.fraction = folder, source, encoder, fraction
        self.next = 0
        """The number of the section that comes next."""
        self.before = False
        """Whether the section before it is held out."""
        self.part = self.in_part = 0
        """The part that it is in, and its number there."""
        self.counts = {0: PassCounts()}
        """What was found in all parts in front of each."""
        self.long = Counter[str]()
        self.bad, self.unfit = BadLines(source.on_bad_line), BadLines("skip")
        self._since = 0
        self._journal = folder.parent / JOURNAL
        state = read_json(self._journal) if self._journal.exists() else {}
        kept: dict[str, Any] = state.pop("splits", {})
        self.writers = {
            split: SplitWriter(folder, split, encoder.vocab_size, shards.SHARD_TOKENS, kept.get(split))
            for split in SPLITS
        }
        if state:
            self.next, self.before, self.long = state["next"], state["before"], Counter(state["long"])
            self.part, self.in_part = state["place"]
            self.counts = {self.part: PassCounts.of(state["counts"])}
            for lines, (count, first) in zip((self.bad, self.unfit), state["left_out"], strict=True):
                lines.count, lines.first = count, first
            log.info("%s: going on behind %s sections, which are tokenised", source.name, f"{self.next:,}")

    def pieces(self, items: Iterable[MergeItem]) -> Iterator[Piece]:
        """The sections of what is left to do."""
        in_part = self.in_part
        for item in items:
            if isinstance(item, PartEnd):
                in_part = 0
                self.counts[item.part + 1] = found = replace(self.counts[item.part])
                found.add(item.counts)
                self.source.reading(item.part + 1, Reached())
                continue
            self.source.reading(item.part, Reached(item.batch.read))
            for number, ids in enumerate(item.encoded.documents()):
                yield Piece(item, number, in_part, ids)
                in_part += 1

    def write(self, pieces: Sequence[Piece]) -> tuple[int, int]:
        """Append sections; returns how many documents begin with them, and the bytes of their text. Raises `UserError`
        where a document is a mistake that ends the splits."""
        held = held_out(self.next, len(pieces) + 1, self.fraction)
        places = [self.before, *held.tolist()]
        written: dict[Split, list[tuple[np.ndarray, bool, int]]] = {split: [] for split in SPLITS}
        documents = n_bytes = 0
        for piece, before, here, after in zip(pieces, places, places[1:], places[2:], strict=False):
            ids, opens, left_out = self._settled(piece, here != before, here != after)
            size = piece.tokens.batch.n_bytes[piece.number]
            documents, n_bytes = documents + opens, n_bytes + size
            if left_out is not None:
                (self.bad if left_out.unreadable else self.unfit).add(left_out.place, left_out.reason)
            else:
                written["validation" if here else "train"].append((ids, opens, size))
        for split, found in written.items():
            size = sum(size for _, _, size in found)
            self.writers[split].write([ids for ids, _, _ in found], [opens for _, opens, _ in found], size)
        last = pieces[-1]
        self.next, self.before = self.next + len(pieces), bool(held[-2])
        self.part, self.in_part = last.tokens.part, last.in_part + 1
        self._since += n_bytes
        if self._since >= JOURNAL_BYTES:
            self._since = 0
            self._keep()
        return documents, n_bytes

    def _settled(self, piece: Piece, begins: bool, ends: bool) -> tuple[np.ndarray, bool, LeftOut | None]:
        """The tokens of a section as it stands where it goes, whether it opens a document there, and why it is left
        out; what is in front of it, or behind it, may go elsewhere."""
        (_, batch, encoded), number = piece.tokens, piece.number
        opens, closes = batch.opens[number], batch.closes[number]
        if not (opens and closes):
            self.long.update(documents=opens, sections=1)
        if (begins and not opens) or (ends and not closes):
            section = Section(batch.sections()[number].text, opens or begins, closes or ends)
            again = Encoded.of(self.encoder, [section])
            return again.ids, section.opens, again.left_out.get(0)
        return piece.ids, opens, encoded.left_out.get(number)

    def _keep(self) -> None:
        """Note in the journal how far this is, once that is on the disk."""
        state = {
            "next": self.next,
            "before": self.before,
            "place": [self.part, self.in_part],
            "counts": asdict(self.counts[self.part]),
            "long": self.long,
            "left_out": [[lines.count, lines.first] for lines in (self.bad, self.unfit)],
            "splits": {split: writer.flush() for split, writer in self.writers.items()},
        }
        replace_file(self._journal, json.dumps(state).encode())

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def summarise(self, n_parts: int) -> None:
        """Say what was left out, and how much was long. Raises `UserError` where there was no text."""
        self.source.summarise(self.counts[n_parts])
        self.bad.summarise(self.source.name)
        self.unfit.summarise(self.source.name, "conversations")
        if self.long["documents"]:
            counts = f"{self.long['documents']:,} long documents were tokenised in {self.long['sections']:,} sections"
            cut = "cut at blank lines where there are any, with nothing between them (section_characters)"
            log.info("%s: %s, %s", self.source.name, counts, cut)


def write_splits(
    folder: Path, source: Source, encoder: SectionEncoder, fraction: float, processes: int | None
) -> tuple[dict[str, Extent], dict[str, str]]:
    """Tokenise all documents into the files of both splits; returns the extent of each, and the hashes of the files."""
    splits, parts = SplitFiles(folder, source, encoder, fraction), source.parts()
    items = Reader(parts, source.on_bad_line, encoder, folder.parent).items(splits.part, splits.in_part, processes)
    try:
        with ProgressLine(source.name, source.done) as progress, closing(items):
            for pieces in grouped(splits.pieces(items), lambda piece: piece.characters):
                progress.add(*splits.write(pieces))
    finally:
        splits.close()
    splits.summarise(len(parts))
    writers = splits.writers
    files = {name: sha256 for writer in writers.values() for name, sha256 in writer.files.items()}
    return {split: writer.extent for split, writer in writers.items()}, files
