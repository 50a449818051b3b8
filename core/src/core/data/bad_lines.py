"""What is done where data cannot be read, and which text a row holds."""

import logging
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from core.config.errors import UserError, at_most
from core.config.fields import short_repr
from core.data.sections import Section, cut_row

log = logging.getLogger("armature")

_MOST_FIELDS = 20
_SURROGATE = re.compile("[\ud800-\udfff]")

OnBadLine = Literal["error", "skip"]


class BadLines:
    """What cannot be read: the first is an error, or all are left out and counted."""

    def __init__(self, policy: OnBadLine) -> None:
        self.policy = policy
        self.count = 0
        self.first = ""

    def add(self, place: str, reason: str) -> None:
        """Report what stands at `place` ("file:line"); raises UserError unless the policy is "skip"."""
        if self.policy == "error":
            raise UserError(f"{place}: {reason}. Fix the data, or leave such lines out with on_bad_line skip")
        self.first = self.first or f"{place}: {reason}"
        self.count += 1

    def summarise(self, name: str) -> None:
        """Log how many were left out, if any."""
        if self.count:
            log.warning("%s: left out %s unreadable lines; the first: %s", name, f"{self.count:,}", self.first)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What keeps files from being read, told in one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def field_text(row: object, text_field: str, place: str, bad: BadLines) -> Iterator[Section]:
    """The text in a row's field, in sections; nothing when the row is reported as unreadable.

    The field `a.b` is `b` of the object in `a`, unless there is one of that very name.
    """
    field = text_field
    while isinstance(row, dict) and field not in row and isinstance(row.get(field.partition(".")[0]), dict):
        outer, _, field = field.partition(".")
        row = row[outer]
    if not isinstance(row, dict):
        bad.add(place, f"expected an object with the field {text_field!r}, got a value of type {type(row).__name__}")
    elif field not in row:
        fields = ", ".join(at_most(_MOST_FIELDS, [short_repr(field) for field in row])) or "none"
        inside = f" in {text_field.removesuffix(f'.{field}')!r}" if field != text_field else ""
        bad.add(place, f"no field {text_field!r}; there are{inside}: {fields} (choose one with text_field)")
    elif not isinstance(text := row[field], str):
        bad.add(place, f"expected text in the field {text_field!r}, got a value of type {type(text).__name__}")
    elif _SURROGATE.search(text):
        bad.add(place, f"the field {text_field!r} holds half of a surrogate pair, which is no character")
    else:
        yield from cut_row(text)
