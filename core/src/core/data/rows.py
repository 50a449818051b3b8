"""Which text a row of data holds, whatever file the row is in."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from core.config.errors import UserError, at_most
from core.config.fields import short_repr
from core.data.bad_lines import BadLines
from core.data.sections import Section, cut_row

HALVES = re.compile("[\ud800-\udfff]")
"""Halves of characters, which are none."""
_MOST_FIELDS = 20


class RowReader(ABC):
    """What is read of a row."""

    @abstractmethod
    def columns(self, path: Path, there: list[str]) -> list[str]:
        """Those of a table's columns that are read. Raises `UserError` where one that is needed is not there."""

    @abstractmethod
    def sections(self, row: object, place: str, bad: BadLines) -> Iterator[Section]:
        """The document in the row at `place`, in sections; nothing where the row is reported as unreadable."""


class TextField(RowReader):
    """The text in one field; `a.b` is `b` of the object in `a`, unless there is a field of that very name."""

    def __init__(self, name: str, section_characters: int | None = None) -> None:
        """`section_characters` is as of `cut_row`."""
        self.name, self.section_characters = name, section_characters

    def columns(self, path: Path, there: list[str]) -> list[str]:
        column = self.name if self.name in there else self.name.partition(".")[0]
        if there.count(column) != 1:
            found = "two columns" if column in there else "no column"
            names = ", ".join(at_most(_MOST_FIELDS, [repr(name[:40]) for name in there])) or "none"
            raise UserError(f"{path} has {found} {column!r}; there are: {names} (choose one with text_field)")
        return [column]

    def sections(self, row: object, place: str, bad: BadLines) -> Iterator[Section]:
        field = self.name
        while isinstance(row, dict) and field not in row and isinstance(row.get(field.partition(".")[0]), dict):
            outer, _, field = field.partition(".")
            row = row[outer]
        if not isinstance(row, dict):
            bad.add(place, f"expected an object with the field {self.name!r}, got a value of type {type(row).__name__}")
        elif field not in row:
            inside = f" in {self.name.removesuffix(f'.{field}')!r}" if field != self.name else ""
            bad.add(place, f"no field {self.name!r}; there are{inside}: {fields_of(row)} (choose one with text_field)")
        elif not isinstance(text := row[field], str):
            bad.add(place, f"expected text in the field {self.name!r}, got a value of type {type(text).__name__}")
        elif HALVES.search(text):
            bad.add(place, f"the field {self.name!r} holds half of a surrogate pair, which is no character")
        else:
            yield from cut_row(text, self.section_characters)


def fields_of(row: dict[str, object]) -> str:
    """The names of a row's fields, for errors."""
    return ", ".join(at_most(_MOST_FIELDS, [short_repr(field) for field in row])) or "none"
