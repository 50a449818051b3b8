"""Documents in local files, whose names say how they are read; a file may be larger than memory."""

import codecs
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, get_args

from core.config.errors import UserError
from core.data.bad_lines import BadLines, reading
from core.data.compressed import COMPRESSIONS, Place, open_bytes
from core.data.json_array import array_values
from core.data.parts import SourcePart
from core.data.rows import RowReader, TextField
from core.data.sections import FILE_CHARACTERS, Section, split_sections
from core.data.tables import arrow_sections, csv_sections, parquet_sections

Format = Literal["txt", "md", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
FORMATS: tuple[Format, ...] = get_args(Format)
COMPRESSED_INSIDE = ("parquet", "arrow")
READ = f"{', '.join(f'.{name}' for name in FORMATS)}, and all but the last two with {', '.join(COMPRESSIONS)} behind"
"""What names may end in, for errors."""
PACKED = (*COMPRESSIONS, ".lz4", ".zip")
ABOUT = re.compile(
    r"(readme|licen[sc]e|notice|copying|citation|changelog|authors)(\..*)?|.*\.(rst|html?|pdf|ya?ml|toml|py|sh|log)"
    r"|.*sums?|.*\.(sha\d+|md5|sig|asc)|_success|(dataset_infos?|dataset_dict|state|metadata)\.json",
    re.IGNORECASE,
)
"""Names of files that lie beside a text and are none: papers, licences, sums, settings. What ends as lines, tables or
.txt is read all the same."""
LINE_BYTES = 2**28
"""A longer line of a .jsonl file is unreadable: it is most likely no line of JSON."""
_PART_BYTES = 2**16


def find_files(dataset: str, format: Format | None = None) -> list[Path]:
    """The files that a path, a folder (searched in depth) or a glob pattern stands for, in a fixed order.

    In a folder, hidden files and those that are about the text (ABOUT) are passed over. A file of another kind is an
    error, wherever it is: nobody should find out later that a part of the text was not read. With a `format` all are of
    that one.
    """
    path = Path(os.path.expanduser(dataset))
    if path.is_dir():
        inside = sorted(_inside(path))
        texts = [p for p in inside if not _is_about(p)]
        files = [p for p in texts if format or format_of(p)]
        others = Counter(_kind(p) for p in texts if not format and not format_of(p))
        if others or not files:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5)) or "no file to read"
            raise UserError(
                f"the folder {path} holds {kinds}, and what is read ends in {READ}: convert the "
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
        if not format and not format_of(file):
            raise UserError(f"cannot tell what {file} holds: its name must end in {READ}, or state its format")
        if not file.is_file():  # reading a pipe would wait for its writer
            raise UserError(f"{file} is a link to nothing, or no regular file")
    return [p.absolute() for p in files]


def format_of(path: Path) -> Format | None:
    """How the name of a file says that it is read; None where it says nothing, or a compression that cannot be."""
    name = path.name.lower()
    packed = name.endswith(COMPRESSIONS)
    stem = name.rpartition(".")[0] if packed else name
    found = next((each for each in FORMATS if stem.endswith(f".{each}")), None)
    return None if packed and found in COMPRESSED_INSIDE else found


def _is_about(path: Path) -> bool:
    """Whether a file in a folder is about the text beside it."""
    return format_of(path) in (None, "md", "json") and ABOUT.fullmatch(path.name) is not None


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


class TextFile(SourcePart):
    """One of the files."""

    travels = is_file = True

    def __init__(
        self, path: Path, found: list[Any], reader: RowReader, format: Format | None, section_characters: int | None
    ) -> None:
        """`found` is what the file was when it was found."""
        self.path, self.found, self.reader, self.format = path, found, reader, format
        self.section_characters, self._at = section_characters, Place()

    def __reduce__(self) -> tuple[Any, ...]:
        return TextFile, (self.path, self.found, self.reader, self.format, self.section_characters)

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def n_bytes(self) -> int:
        return self._at.n_bytes

    def sections_of(self, bad: BadLines) -> Iterator[Section]:
        self._check_unchanged()
        yield from read_sections(self.path, self.reader, bad, self.format, self._at, self.section_characters)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Text that changes under a run would be read as something that its fingerprint does not stand for."""
        if file_state(self.path) != self.found:
            raise UserError(
                f"{self.path} has changed since the run began to read: start again once nothing writes there"
            )


def file_state(file: Path) -> list[Any]:
    """The path of a file, its size and when it was changed last."""
    with reading(file):
        found = file.stat()
    return [str(file), found.st_size, found.st_mtime_ns]


def read_sections(
    path: Path,
    reader: RowReader,
    bad: BadLines,
    format: Format | None = None,
    place: Place | None = None,
    section_characters: int | None = None,
) -> Iterator[Section]:
    """The documents of one file, in order and in sections: a text is one, and so is every line or row of the others.

    Sections of a text have at most `section_characters`, None is FILE_CHARACTERS; those of others are the reader's.
    """
    kind = format or format_of(path)
    with reading(path):
        if kind == "parquet":
            yield from parquet_sections(path, reader, bad)
        elif kind == "arrow":
            yield from arrow_sections(path, reader, bad)
        else:
            with open_bytes(path, place) as file:
                limit = FILE_CHARACTERS if section_characters is None else section_characters
                yield from _sections_of(kind, file, path, reader, bad, limit)


def _sections_of(
    kind: Format | None, file: IO[bytes], path: Path, reader: RowReader, bad: BadLines, limit: int
) -> Iterator[Section]:
    if kind in ("csv", "tsv"):
        yield from csv_sections(file, path, reader, bad, "," if kind == "csv" else "\t")
    elif kind == "json" and _begins_an_array(path):
        for number, row in array_values(file, path):
            yield from reader.sections(row, f"{path}, value {number}", bad)
    elif kind in ("json", "jsonl"):
        yield from _json_lines(file, path, reader, bad)
    elif not isinstance(reader, TextField):
        raise UserError(f"{path} is one text, and has no rows with fields: give lines of JSON, or a table")
    else:
        yield from split_sections(_text_parts(file, path, bad), limit)


def _begins_an_array(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(_PART_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _json_lines(file: IO[bytes], path: Path, reader: RowReader, bad: BadLines) -> Iterator[Section]:
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
                yield from reader.sections(row, f"{path}:{number}", bad)


def _text_parts(file: IO[bytes], path: Path, bad: BadLines) -> Iterator[str]:
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
