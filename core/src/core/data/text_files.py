"""Documents in local files: .txt and .jsonl, plain or .gz, read by lines so that a file may be larger than memory."""

import codecs
import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Literal, TypeAlias

from core.config.errors import UserError, at_most
from core.config.fields import short_repr
from core.data.sections import FILE_CHARACTERS, Section, cut_row, split_sections
from core.runtime.log import LOGGER

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
ABOUT = re.compile(
    r"(readme|licen[sc]e|notice|copying|citation|changelog|authors)(\..*)?|.*\.(md|rst|html?|pdf|ya?ml|toml|py|sh|log)"
    r"|.*sums?|.*\.(sha\d+|md5|sig|asc)|_success|(dataset_infos?|dataset_dict|state|metadata)\.json",
    re.IGNORECASE,
)
"""Names of files that lie beside a text and are none: papers, licences, sums, settings."""
LINE_BYTES = 2**28
"""A longer line of a .jsonl file is unreadable: it is most likely no line of JSON."""
_PART_BYTES = 2**16
_MOST_FIELDS = 20
_SURROGATE = re.compile("[\ud800-\udfff]")

OnBadLine = Literal["error", "skip"]
Lines: TypeAlias = gzip.GzipFile | BufferedReader


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
            LOGGER.warning("%s: left out %s unreadable lines; the first: %s", name, f"{self.count:,}", self.first)


def find_files(dataset: str) -> list[Path]:
    """The files that a path, a folder (searched in depth) or a glob pattern stands for, in a fixed order.

    In a folder, hidden files and those that are about the text (ABOUT) are passed over. A file of another kind is an
    error, wherever it is: nobody should find out later that a part of the text was not read.
    """
    path = Path(os.path.expanduser(dataset))
    if path.is_dir():
        inside = sorted(_inside(path))
        files = [p for p in inside if _suffix(p)]
        others = Counter(_kind(p) for p in inside if not _suffix(p) and not ABOUT.fullmatch(p.name))
        if others or not files:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5)) or "no file to read"
            raise UserError(
                f"the folder {path} holds {kinds}, and what is read ends in {', '.join(SUFFIXES)}: convert the "
                f"files, move them away, or name those to read by a pattern such as '{path}/**/*.jsonl'"
            )
    elif path.exists():
        files = [path]
    elif glob.has_magic(dataset):
        files = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not files:
            raise UserError(f"no file matches {dataset}: check the pattern (** searches folders in depth)")
    else:
        raise UserError(f"there is no {path}: give stdlib, a file, a folder, a glob pattern or hf:NAME")
    for file in files:
        if not _suffix(file):
            raise UserError(f"cannot tell what {file} holds: its name must end in {', '.join(SUFFIXES)}")
        if not file.is_file():  # reading a pipe would wait for its writer
            raise UserError(f"{file} is a link to nothing, or no regular file")
    return [p.absolute() for p in files]


def _suffix(path: Path) -> str | None:
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def _kind(path: Path) -> str:
    """The end of a file's name that says what is in it."""
    packed = len(path.suffixes) > 1 and path.suffix.lower() in PACKED
    return "".join(path.suffixes[-2:] if packed else path.suffixes[-1:]).lower() or "without a suffix"


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, behind links too, but no folder twice; hidden ones are passed over."""
    seen = set()
    for name, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        found = os.stat(name)
        new = (found.st_dev, found.st_ino) not in seen
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(each for each in folders if new and not each.startswith("."))
        yield from (Path(name, each) for each in names if new and not each.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def read_sections(path: Path, text_field: str, bad: BadLines) -> Iterator[Section]:
    """The documents of one file, in order and in sections: a text file is one, and so is every line of a .jsonl."""
    with reading(path), _open(path) as file:
        if ".jsonl" in (_suffix(path) or ""):
            yield from _json_lines(file, path, text_field, bad)
        else:
            yield from split_sections(_text_parts(file, path, bad), FILE_CHARACTERS)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What keeps files from being read, told in one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _open(path: Path) -> Lines:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _json_lines(file: Lines, path: Path, text_field: str, bad: BadLines) -> Iterator[Section]:
    number = 0
    while line := file.readline(LINE_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            bad.add(f"{path}:{number}", f"the line is longer than {LINE_BYTES:,} bytes")
            while (line := file.readline(LINE_BYTES)) and not line.endswith(b"\n"):
                pass
        elif not line.isspace():
            try:
                text = line.decode("utf-8")
                line = b""  # a long line is in memory as seldom as possible
                row = json.loads(text)
            except UnicodeDecodeError as error:
                bad.add(f"{path}:{number}", f"not UTF-8 ({error.reason} at byte {error.start})")
            except (ValueError, RecursionError) as error:
                bad.add(f"{path}:{number}", f"not JSON ({error})")
            else:
                text = ""
                yield from field_text(row, text_field, f"{path}:{number}", bad)


def field_text(row: object, text_field: str, place: str, bad: BadLines) -> Iterator[Section]:
    """The text in a row's field, in sections; nothing when the row is reported as unreadable."""
    if not isinstance(row, dict):
        bad.add(place, f"expected an object with the field {text_field!r}, got a value of type {type(row).__name__}")
    elif text_field not in row:
        fields = ", ".join(at_most(_MOST_FIELDS, [short_repr(field) for field in row])) or "none"
        bad.add(place, f"no field {text_field!r}; there are: {fields} (choose one with text_field)")
    elif not isinstance(text := row[text_field], str):
        bad.add(place, f"expected text in the field {text_field!r}, got a value of type {type(text).__name__}")
    elif _SURROGATE.search(text):
        bad.add(place, f"the field {text_field!r} holds half of a surrogate pair, which is no character")
    else:
        yield from cut_row(text)


def _text_parts(file: Lines, path: Path, bad: BadLines) -> Iterator[str]:
    """The text of a file in lines, very long lines in several parts; a part that is not UTF-8 is reported."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    first = True
    while True:
        part = file.readline(_PART_BYTES)
        if first:
            part = part.removeprefix(codecs.BOM_UTF8)
        first = False
        ends = part.endswith(b"\n")
        try:
            yield decoder.decode(part, final=ends or not part)
        except UnicodeDecodeError as error:
            decoder.reset()
            bad.add(f"{path}:{number}", f"not UTF-8 ({error.reason})")
        if not part:
            return
        number += ends
