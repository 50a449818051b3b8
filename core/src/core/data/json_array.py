"""A JSON array that may be larger than memory, read value by value."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core.config.errors import UserError

_PART_BYTES = 2**20
_VALUE_CHARACTERS = 2**28
_BLANK = re.compile(r"[ \t\r\n]*")


def array_values(file: IO[bytes], path: Path) -> Iterator[tuple[int, Any]]:
    """The values of the one array that a file holds, each with its number, from 1.

    Raises UserError where the file is no array to its end: what stands behind a mistake cannot be told apart from it.
    """
    text = _Text(file, path)
    decoder, number = json.JSONDecoder(), 0
    text.take("[", f"{path} is no JSON array")
    while not text.takes("]"):
        if number:
            text.take(",", f"{path}: no comma behind value {number:,} of the array")
        number += 1
        yield number, text.value(decoder, f"{path}: value {number:,} of the array")
    if text.next():
        raise UserError(f"{path} goes on behind its JSON array")


class _Text:
    """The text of a file from where it is read on."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.held, self.place, self.ended = file, path, "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> None:
        """Read on, as much again as is held."""
        data = self.file.read(max(_PART_BYTES, len(self.held) - self.place))
        self.ended = not data
        try:
            self.held, self.place = self.held[self.place :] + self.decoder.decode(data, final=self.ended), 0
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8: {error.reason}") from error

    def next(self) -> str:
        """The next character that is not blank; nothing at the end."""
        while True:
            match = _BLANK.match(self.held, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self.held) or self.ended:
                return self.held[self.place : self.place + 1]
            self.more()

    def takes(self, character: str) -> bool:
        """Whether the next character is this one, which is then behind."""
        found = self.next() == character
        self.place += found
        return found

    def take(self, character: str, otherwise: str) -> None:
        if not self.takes(character):
            raise UserError(otherwise)

    def value(self, decoder: json.JSONDecoder, name: str) -> Any:
        """The value that stands next."""
        self.next()
        while True:
            try:
                value, end = decoder.raw_decode(self.held, self.place)
            except (ValueError, RecursionError) as error:
                if self.ended or isinstance(error, RecursionError):
                    raise UserError(f"{name} is not JSON ({error})") from error
            else:
                if end < len(self.held) or self.ended:
                    self.place = end
                    return value
            if len(self.held) - self.place > _VALUE_CHARACTERS:
                raise UserError(f"{name} is longer than {_VALUE_CHARACTERS:,} characters, or not JSON")
            self.more()
