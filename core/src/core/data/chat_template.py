"""Conversations as a tokenizer's chat template writes them, and which characters of that the assistant wrote.

A template is a program in Jinja's language that others wrote: it runs in a sandbox, as at Hugging Face, and knows no
clock. What it says the assistant wrote stands between marks, which are characters that no text may have; so do special
tokens that somebody wrote into a message, which stay text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.config.errors import UserError
from core.config.fields import short_repr
from core.data.hf_tokenizer import HuggingFace
from core.data.library import library_errors

_BEGINS, _ENDS, _LITERAL, _LITERAL_ENDS = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Marks: noncharacters, which Unicode keeps out of texts."""
_MARK = re.compile(f"([{_BEGINS}-{_LITERAL_ENDS}])")
_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

ChatMessage = dict[str, Any]


class TemplateError(Exception):
    """A conversation that the template refuses, or whose turns it does not keep apart."""


class Span(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    counts: bool
    """Whether the assistant wrote it."""
    literal: bool
    """Whether it is a special token that stands in a message, where it is text."""


class AssistantBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes, put between marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGINS}{caller()}{_ENDS}"


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer."""

    def __init__(self, model: HuggingFace, source: str, *, day: str | None = None) -> None:
        """`day`, as 2026-01-31, is what a template is told that asks for the date."""
        self.model, self.source = model, source
        self.has_blocks = _BLOCK.search(source) is not None
        self._day = date.fromisoformat(day) if day else None
        longest_first: list[str] = sorted(model.special_texts, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(text) for text in longest_first))
        environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[AssistantBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": self._date}
        with library_errors("the chat template cannot be read"):
            self._template = environment.from_string(source)

    def spans(self, messages: Sequence[ChatMessage], tools: Any, *, asked: int = 0) -> list[Span]:
        """A conversation as the template writes it; no turn in its first `asked` messages counts. Raises
        `TemplateError`."""
        messages = [self._mark(message) for message in messages]
        text = self._render(messages, tools)
        if not self.has_blocks:
            text = self._find_turns(text, messages, tools)
        spans = list(_spans(text))
        if asked == 0:
            return spans
        prompt = _MARK.sub("", self._render(messages[:asked], tools))
        if not "".join(span.text for span in spans).startswith(prompt):
            raise TemplateError("the chat template writes the prompt in another way once the completion follows")
        return _after(spans, len(prompt))

    def prompt(self, messages: Sequence[ChatMessage]) -> list[Span]:
        """A conversation up to where the assistant's next turn begins. Raises `TemplateError`."""
        marked = [self._mark(message) for message in messages]
        return list(_spans(self._render(marked, None, add_generation_prompt=True)))

    def _find_turns(self, text: str, messages: list[ChatMessage], tools: Any) -> str:
        """The text with marks around what the assistant wrote, of a template that does not say what that is.

        It is what a turn adds to the prompt for it, up to the special token that ends it. That holds where the text up
        to each turn stays as it is when the conversation goes on; elsewhere it is a `TemplateError`.
        """
        marked, done = "", 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = self._render(messages[:number], tools, add_generation_prompt=True)
            turn = self._render(messages[: number + 1], tools)
            if not (turn.startswith(prompt) and text.startswith(turn) and len(prompt) >= done):
                raise TemplateError(
                    "the chat template has no {% generation %} block, and writes message "
                    f"{number + 1} in another way once others follow: give one that has such blocks, with template"
                )
            end = len(turn.rstrip())
            if not any(turn.endswith(special, 0, end) for special in self.model.special_texts):
                end = len(turn)
            marked += f"{text[done : len(prompt)]}{_BEGINS}{text[len(prompt) : end]}{_ENDS}"
            done = end
        return marked + text[done:]

    def _render(self, messages: list[ChatMessage], tools: Any, *, add_generation_prompt: bool = False) -> str:
        values = {"messages": messages, "tools": tools, "documents": None, **self.model.special_tokens}
        try:
            return self._template.render(**values, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            raise
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(f"the chat template fails: {said}") from error

    def _mark(self, value: Any) -> Any:
        """Data as a template gets it: without fields that are null, and with marks around special tokens."""
        if isinstance(value, str):
            if mark := _MARK.search(value):
                raise TemplateError(f"a message holds the noncharacter U+{ord(mark[0]):04X}")
            marked = f"{_LITERAL}\\g<0>{_LITERAL_ENDS}"
            return self._special.sub(marked, value) if self.model.special_texts else value
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items() if item is not None}
        return [self._mark(item) for item in value] if isinstance(value, list) else value

    def _date(self, form: str) -> str:
        if self._day is None:
            raise TemplateError("it asks for the date of today, which would change with it: state one with day")
        return self._day.strftime(form)


def encode(model: HuggingFace, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The ids of a rendered conversation, and whether each counts: one does that has a character of the assistant's."""
    ids: list[int] = []
    counts: list[bool] = []
    for number, (literal, group) in enumerate(groupby(spans, key=lambda span: span.literal)):
        piece = list(group)
        text = "".join(span.text for span in piece)
        own = [span.counts for span in piece for _ in span.text]
        special = not literal
        found, places = model.encode_placed(f"\n{text}" if number else text, special=special)
        lead = 1 if number and all(last <= 1 or first >= 1 for first, last in places) else 0
        if number and not lead:  # the line end, which keeps a space from being put in front, has become one with it
            found, places = model.encode_placed(text, special=special)
        for token, (first, last) in zip(found, places, strict=True):
            if last > lead or not lead:
                ids.append(token)
                counts.append(any(own[max(first - lead, 0) : last - lead]))
    return ids, counts


def _spans(text: str) -> Iterator[Span]:
    counts = literal = False
    for part in _MARK.split(text):
        if part in (_BEGINS, _ENDS) and part:
            counts = part == _BEGINS
        elif part in (_LITERAL, _LITERAL_ENDS) and part:
            literal = part == _LITERAL
        elif part:
            yield Span(part, counts, literal)


def _after(spans: list[Span], place: int) -> list[Span]:
    """The spans, of which nothing counts before a place in the whole text."""
    found: list[Span] = []
    for span in spans:
        head = span.text[:place]
        place -= len(head)
        found += [Span(head, False, span.literal)] if head else []
        found += [span._replace(text=span.text[len(head) :])] if len(head) < len(span.text) else []
    return found


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without escapes for HTML, which Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def choose_template(templates: dict[str, str], *, tools: bool) -> str:
    """The template for conversations with tools, or without. Raises `UserError` where there is none."""
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        there = ", ".join(map(short_repr, templates)) or "none"
        raise UserError(
            f"the tokenizer has no chat template of the name {name} (there are: {there}): give a file with template"
        )
    return templates[name]
