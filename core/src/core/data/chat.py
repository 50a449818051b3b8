"""Rows of conversations: whole ones side by side, of which the assistant's turns count for the loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np

from core.config.record import absolute
from core.config.text_file import read_text
from core.data.bins import PackedRows
from core.data.conversations import ConversationEncoder, Conversations, Counted
from core.data.corpus import Corpus
from core.data.hf_tokenizer import TEMPLATE_MIB
from core.data.packing import Batch, pack_rows
from core.data.samples import IndexedSamples
from core.data.text import IndexedText


class Chat(IndexedSamples):
    """Conversations, or prompts and completions, rendered by the tokenizer's chat template and packed best-fit.

    They are tokenised once, into a cache; one that is too long is cut behind a turn.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedText.Config):
        packing: Literal["concatenate", "best_fit"] = "best_fit"
        """best_fit: conversations stand whole in rows, which are filled up with padding, which does not count."""
        text_field: str = "messages"
        """The field with the list of messages (role, content); a row without may have prompt and completion."""
        template: str | None = None
        """A file with a chat template in Jinja; None is that of the tokenizer."""
        day: str | None = None
        """What a template is told that asks for today's date, as 2026-01-31."""
        loss: Counted = "assistant"
        """Which tokens count: those that the assistant wrote, or all."""

        def places(self) -> dict[str, Any]:
            return {**Corpus.Config.places(self), "template": absolute(self.template)}

        def problems(self) -> Iterator[tuple[str, str]]:
            """A day that is none, and rows that would cut conversations."""
            yield from super().problems()
            try:
                date.fromisoformat(self.day or "2026-01-31")
            except ValueError:
                yield "day", f"day {self.day} is none: write it as 2026-01-31"
            if self.packing != "best_fit":
                yield "packing", "conversations are packed whole: leave packing at best_fit"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        c = self.config
        encoder = ConversationEncoder(
            self.tokenizer,
            template=None if c.template is None else read_text(c.template, TEMPLATE_MIB),
            day=c.day,
            counted=c.loss,
            most_tokens=self.seq_len + 1,
        )
        corpus = Corpus(c, tokenizer=encoder, reader=Conversations(c.text_field), verify=self.verify)
        self.description = corpus.describe(self.split)
        self.fingerprint = corpus.manifest.splits[self.split].sha256
        self._rows = PackedRows(corpus.split(self.split), self.seq_len)
        self.rows_per_epoch, self.filled = self._rows.n_rows, self._rows.filled
        self.description += f", {self._rows.padding:.1%} padding"

    def rows_at(self, numbers: np.ndarray) -> Batch:
        marked, opens, filled = self._rows.windows(numbers)
        return pack_rows(marked // 2, opens, filled, marked % 2 == 1)
