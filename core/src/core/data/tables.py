"""The rows of tables: CSV and TSV, Parquet, Arrow. They are counted from 1, without the head."""

import csv
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from core.config.errors import UserError
from core.data.bad_lines import BadLines
from core.data.compressed import check_arrow
from core.data.library import library_errors
from core.data.rows import RowReader
from core.data.sections import Section

_BATCH_ROWS = 256
_GROUPS = 4
_FIELD_CHARACTERS = 2**28


def csv_sections(file: IO[bytes], path: Path, reader: RowReader, bad: BadLines, delimiter: str) -> Iterator[Section]:
    """The documents of a table with a head, quoted as spreadsheets do; one is a row, which may go over several lines.

    Raises UserError for a head without the column, whatever is done about bad lines.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    head: list[str] | None = None
    columns: list[str] = []
    while True:
        try:
            row = _next_row(rows)
        except csv.Error as error:
            bad.add(f"{path}:{rows.line_num}", f"not a row of a table ({error})")
            continue
        if row is None:
            text.detach()  # the file is closed by whoever opened it
            return
        if head is None:
            columns, head = reader.columns(path, row), row
        elif row and len(row) != len(head):
            bad.add(f"{path}:{rows.line_num}", f"a row of {len(row)} columns, and the head has {len(head)}")
        elif row:
            values = {column: row[head.index(column)] for column in columns}
            if any("\udc80" <= letter <= "\udcff" for value in values.values() for letter in value):
                bad.add(f"{path}:{rows.line_num}", "not UTF-8")
            else:
                yield from reader.sections(values, f"{path}:{rows.line_num}", bad)


def _next_row(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, whose fields may be long; the limit that Python has for a process is put back."""
    limit = csv.field_size_limit(_FIELD_CHARACTERS)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(limit)


def parquet_sections(path: Path, reader: RowReader, bad: BadLines) -> Iterator[Section]:
    """The documents of a Parquet file, of which only the columns that are asked for are read, and little at a time."""
    check_arrow(path)
    from pyarrow import parquet

    with library_errors(f"cannot read {path}"):
        file = parquet.ParquetFile(path, memory_map=True)
        columns = reader.columns(path, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
    with file:
        yield from _batch_sections(batches, path, columns, reader, bad)


class ParquetRows:
    """The rows of a Parquet file by their numbers: a group of them is read at once, and the last few are kept."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Raises `UserError` for a file that cannot be read, or that lacks one of the columns."""
        check_arrow(path)
        from pyarrow import parquet

        with library_errors(f"cannot read {path}"):
            self._file = parquet.ParquetFile(path, memory_map=True)
        if lost := [name for name in columns if name not in self._file.schema_arrow.names]:
            raise UserError(f"{path} has no column {lost[0]}: it has {', '.join(self._file.schema_arrow.names)}")
        self.path, self._columns = path, list(columns)
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._groups: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The values of a row, by the names of the columns."""
        group = bisect_right(self._starts, number) - 1
        if group not in self._groups:
            with library_errors(f"cannot read {self.path}"):
                found = self._file.read_row_group(group, columns=self._columns)
            self._groups = {**dict(list(self._groups.items())[1 - _GROUPS :]), group: found}
        (row,) = self._groups[group].slice(number - self._starts[group], 1).to_pylist()
        return row


def arrow_sections(path: Path, reader: RowReader, bad: BadLines) -> Iterator[Section]:
    """The documents of an Arrow file, in the format for files or that for streams, which `save_to_disk` writes."""
    check_arrow(path)
    import pyarrow

    with library_errors(f"cannot read {path}"), open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        source = pyarrow.memory_map(str(path))
        table = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        columns = reader.columns(path, table.schema.names)
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else iter(table)
    with source:
        yield from _batch_sections(batches, path, columns, reader, bad)


def _batch_sections(
    batches: Iterator[Any], path: Path, columns: list[str], reader: RowReader, bad: BadLines
) -> Iterator[Section]:
    number = 0
    while True:
        with library_errors(f"cannot read {path}, behind row {number:,}"):
            batch = next(batches, None)
            values = None if batch is None else [batch.column(batch.schema.get_field_index(name)) for name in columns]
        if values is None:
            return
        for row in zip(*values, strict=True):
            number += 1
            found = {name: value.as_py() for name, value in zip(columns, row, strict=True)}
            yield from reader.sections(found, f"{path}, row {number}", bad)
