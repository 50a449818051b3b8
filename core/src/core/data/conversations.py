"""Rows that hold conversations, or a prompt and its completion; tokens of them, each with whether its loss counts."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.config.errors import UserError
from core.data.bad_lines import BadLines
from core.data.chat_template import ChatTemplate, Span, TemplateError, choose_template, encode
from core.data.rows import HALVES, RowReader, fields_of
from core.data.sections import LeftOut, Section
from core.data.shards import json_digest
from core.data.tokenizer import Tokenizer

Counted = Literal["assistant", "all"]
PAIR = ("prompt", "completion")
PREFERENCES = ("chosen", "rejected")
_VERSION = 1
"""Another one whenever the same conversations become other tokens."""


class Conversations(RowReader):
    """A list of messages in one field, with `tools` beside it, or the fields `prompt` and `completion`.

    The text of a section is JSON of the place of the row and of those fields.
    """

    def __init__(self, field: str) -> None:
        self.field = field

    def columns(self, path: Path, there: list[str]) -> list[str]:
        self._check_preferences(there, str(path))
        found = [name for name in (self.field, "tools", *PAIR) if name in there]
        if self.field not in there and not set(PAIR) <= set(there):
            raise UserError(
                f"{path} has no column {self.field!r}, and no prompt and completion (choose one with text_field)"
            )
        return found

    def sections(self, row: object, place: str, bad: BadLines) -> Iterator[Section]:
        if not isinstance(row, dict):
            return bad.add(place, f"expected an object with messages, got a value of type {type(row).__name__}")
        self._check_preferences(list(row), place)
        found = {name: row[name] for name in (self.field, "tools", *PAIR) if row.get(name) is not None}
        if (problem := self._problem(found, row)) is not None:
            return bad.add(place, problem)
        if self.field in found:
            found["messages"] = found.pop(self.field)
        try:
            text = json.dumps([place, found], ensure_ascii=False)
        except (TypeError, ValueError) as error:  # a date, say, of a table
            return bad.add(place, f"holds what is no JSON ({error})")
        if HALVES.search(text):
            return bad.add(place, "holds half of a surrogate pair, which is no character")
        yield Section(text)

    def _problem(self, found: dict[str, Any], row: dict[str, Any]) -> str | None:
        """What is wrong with the fields of a row."""
        if self.field in found:
            return _message_problem(found[self.field], self.field)
        if not set(PAIR) <= found.keys():
            return f"no field {self.field!r}, and no prompt and completion; there are: {fields_of(row)}"
        kinds = {type(found[name]) for name in PAIR}
        if kinds == {str}:
            return None
        if kinds != {list}:
            return "prompt and completion must both be texts, or both lists of messages"
        return next((problem for name in PAIR if (problem := _message_problem(found[name], name))), None)

    @staticmethod
    def _check_preferences(names: list[str], place: str) -> None:
        if set(PREFERENCES) <= set(names):
            raise UserError(
                f"{place} holds preference pairs (chosen, rejected), and nothing here learns from those: give "
                "conversations in messages, or prompt and completion"
            )


def _message_problem(messages: Any, name: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        found = "an empty one" if messages == [] else type(messages).__name__
        return f"the field {name!r} must hold a list of messages, not {found}"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} in {name!r} must be an object with a role"
    return None


class ConversationEncoder:
    """Conversations to tokens: a token of id t is written 2 t, and 2 t + 1 where its loss counts.

    A conversation of more than `most_tokens` is cut behind the last turn of the assistant's that fits; one without such
    a turn is left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template: str | None, day: str | None, counted: Counted, most_tokens: int
    ) -> None:
        self._made_of = {"template": template, "day": day, "counted": counted, "most_tokens": most_tokens}
        self.tokenizer, self.counted, self.most_tokens = tokenizer, counted, most_tokens
        self.model = model = tokenizer.templating
        self._templates = model.chat_templates if template is None else {"default": template}
        self._day, self._made = day, dict[str, ChatTemplate]()
        self.vocab_size = 2 * tokenizer.vocab_size
        self.fingerprint = json_digest(
            [_VERSION, tokenizer.fingerprint, model.special_tokens, self._templates, day, counted, most_tokens]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.tokenizer, **self._made_of), ()

    def encode_sections(self, sections: Sequence[Section]) -> list[list[int] | LeftOut]:
        """The tokens of each conversation, or why there are none."""
        return [self._encode(*json.loads(section.text)) for section in sections]

    def _encode(self, place: str, row: dict[str, Any]) -> list[int] | LeftOut:
        try:
            found = self._of_pair(row) if isinstance(row.get("prompt"), str) else self._of_messages(row)
        except TemplateError as error:
            return LeftOut(place, str(error), unreadable=True)
        if found is None:
            return LeftOut(place, f"no turn of it fits into {self.most_tokens:,} tokens", unreadable=False)
        ids, counts = found
        if not any(counts[1:]):
            return LeftOut(place, "the assistant has no turn in it, so that nothing counts", unreadable=True)
        return (2 * np.array(ids) + np.array(counts)).tolist()

    def _of_pair(self, row: dict[str, Any]) -> tuple[list[int], list[bool]] | None:
        """A prompt and its completion, between the tokens that begin and end a document."""
        spans = [Span(row["prompt"], self.counted == "all", True), Span(row["completion"], True, True)]
        ids, counts = encode(self.model, [span for span in spans if span.text])
        before, after = ([] if token is None else [token] for token in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        ids, counts = before + ids + after, [False] * len(before) + counts + [True] * len(after)
        return (ids, counts) if len(ids) <= self.most_tokens else None

    def _of_messages(self, row: dict[str, Any]) -> tuple[list[int], list[bool]] | None:
        messages = row.get("messages") or [*row["prompt"], *row["completion"]]
        asked = 0 if "messages" in row else len(row["prompt"])
        while messages:
            ids, counts = self._render(messages, row.get("tools"), asked)
            if len(ids) <= self.most_tokens:
                return ids, counts
            kept = [number for number, message in enumerate(messages[:-1], 1) if message["role"] == "assistant"]
            messages = messages[: kept[-1]] if kept and kept[-1] > asked else []
        return None

    def _render(self, messages: list[Any], tools: Any, asked: int) -> tuple[list[int], list[bool]]:
        """`asked` messages are a prompt, in which no turn counts."""
        source = choose_template(self._templates, tools=tools is not None)
        if source not in self._made:
            self._made[source] = ChatTemplate(self.model, source, day=self._day)
        ids, counts = encode(self.model, self._made[source].spans(messages, tools, asked=asked))
        return ids, [True] * len(ids) if self.counted == "all" else counts
