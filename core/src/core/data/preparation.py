"""The documents of a source written as tokens, in a journal so that a preparation that was interrupted continues."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.config.json_file import read_json
from core.data import shards
from core.data.bad_lines import BadLines
from core.data.progress import ProgressLine
from core.data.sampling import SPLITS, held_out
from core.data.sections import Section, batches, settled
from core.data.shards import Extent
from core.data.source import Source
from core.data.split_writer import SplitWriter
from core.data.staging import JOURNAL
from core.data.workers import Encoded, SectionEncoder, encoded_in_order
from core.runtime.disk import replace_file

log = logging.getLogger("armature")

JOURNAL_BYTES = 2**26
"""Text between two entries of the journal."""


class SectionBatch(NamedTuple):
    """Sections that are tokenised together."""

    first: int
    """The number of the first among all."""
    sections: list[Section]
    held: np.ndarray
    """Which of them are held out, and whether the one behind them is."""
    long: Counter[str]
    """Long documents and their sections."""


class SplitFiles:
    """Both splits as they are written, how far that is, and what was left out."""

    def __init__(self, folder: Path, source: Source, encoder: SectionEncoder) -> None:
        self.folder, self.source = folder, source
        self.next = 0
        """The number of the section that comes next."""
        self.before = False
        """Whether the section before it is held out."""
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
            for lines, (count, first) in zip((self.bad, self.unfit), state["left_out"], strict=True):
                lines.count, lines.first = count, first
            log.info("%s: going on behind %s sections, which are tokenised", source.name, f"{self.next:,}")

    def jobs(self, fraction: float) -> Iterator[SectionBatch]:
        """What is left to do."""
        first, before = self.next, self.before
        for batch in batches(islice(self.source.sections(), first, None)):
            held = held_out(first, len(batch) + 1, fraction)
            long = Counter(
                documents=sum(section.opens and not section.closes for section in batch),
                sections=sum(not section.opens or not section.closes for section in batch),
            )
            yield SectionBatch(first, settled(batch, [before, *held.tolist()]), held, long)
            first, before = first + len(batch), bool(held[-2])

    def write(self, job: SectionBatch, tokens: Encoded) -> int:
        """Append what was made of a job; returns the bytes of its text. Raises `UserError` where a document is a
        mistake that ends the splits."""
        for each in tokens.left_out.values():
            (self.bad if each.unreadable else self.unfit).add(each.place, each.reason)
        sizes = np.array([len(section.text.encode()) for section in job.sections])
        there = np.array([number not in tokens.left_out for number in range(len(job.sections))])
        documents, validation = tokens.documents(), job.held[:-1]
        for split, chosen in (("train", there & ~validation), ("validation", there & validation)):
            places = np.flatnonzero(chosen).tolist()
            opens = [job.sections[i].opens for i in places]
            self.writers[split].write([documents[i] for i in places], opens, int(sizes[chosen].sum()))
        self.next, self.before = job.first + len(job.sections), bool(validation[-1])
        self.long.update(job.long)
        n_bytes = int(sizes.sum())
        self._since += n_bytes
        if self._since >= JOURNAL_BYTES:
            self._since = 0
            self._keep()
        return n_bytes

    def _keep(self) -> None:
        """Note in the journal how far this is, once that is on the disk."""
        state = {
            "next": self.next,
            "before": self.before,
            "long": self.long,
            "left_out": [[lines.count, lines.first] for lines in (self.bad, self.unfit)],
            "splits": {split: writer.flush() for split, writer in self.writers.items()},
        }
        replace_file(self._journal, json.dumps(state).encode())

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def summarise(self) -> None:
        """Say what was left out, and how much was long."""
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
    splits = SplitFiles(folder, source, encoder)
    try:
        with ProgressLine(source.name, source.done) as progress:
            for job, tokens in encoded_in_order(encoder, splits.jobs(fraction), lambda job: job.sections, processes):
                n_bytes = splits.write(job, tokens)
                progress.add(sum(section.opens for section in job.sections), n_bytes)
    finally:
        splits.close()
    splits.summarise()
    writers = splits.writers
    files = {name: sha256 for writer in writers.values() for name, sha256 in writer.files.items()}
    return {split: writer.extent for split, writer in writers.items()}, files
