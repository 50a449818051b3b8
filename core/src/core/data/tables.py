"""The text in one column of tables: CSV and TSV, Parquet, Arrow. Rows are counted from 1, without the head."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core.config.errors import UserError, at_most
from core.data.bad_lines import BadLines, field_text
from core.data.compressed import check_arrow
from core.data.library import library_errors
from core.data.sections import Section

_BATCH_ROWS = 256
_FIELD_CHARACTERS = 2**28
_MOST_COLUMNS = 20


def csv_sections(file: IO[bytes], path: Path, text_field: str, bad: BadLines, delimiter: str) -> Iterator[Section]:
    """The documents of a table with a head, quoted as spreadsheets do; one is a row, which may go over several lines.

    Raises UserError for a head without the column, whatever is done about bad lines.
    """
    csv.field_size_limit(_FIELD_CHARACTERS)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    head: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            bad.add(f"{path}:{rows.line_num}", f"not a row of a table ({error})")
            continue
        if row is None:
            text.detach()  # the file is closed by whoever opened it
            return
        if head is None:
            check_column(path, text_field, row)
            head = row
        elif row and len(row) != len(head):
            bad.add(f"{path}:{rows.line_num}", f"a row of {len(row)} columns, and the head has {len(head)}")
        elif row:
            value = row[head.index(text_field)]
            if any("\udc80" <= letter <= "\udcff" for letter in value):
                bad.add(f"{path}:{rows.line_num}", "not UTF-8")
            else:
                yield from field_text({text_field: value}, text_field, f"{path}:{rows.line_num}", bad)


def check_column(path: Path, column: str, columns: list[str]) -> None:
    """Raise UserError unless the column is there, and once."""
    if columns.count(column) != 1:
        found = "two columns" if column in columns else "no column"
        there = ", ".join(at_most(_MOST_COLUMNS, [repr(name[:40]) for name in columns])) or "none"
        raise UserError(f"{path} has {found} {column!r}; there are: {there} (choose one with text_field)")


def parquet_sections(path: Path, text_field: str, bad: BadLines) -> Iterator[Section]:
    """The documents of a Parquet file, of which only the column that is asked for is read, and little at a time."""
    check_arrow(path)
    from pyarrow import parquet

    with library_errors(f"cannot read {path}"):
        file = parquet.ParquetFile(path, memory_map=True)
        column = column_of(path, text_field, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=[column])
    with file:
        yield from _batch_sections(batches, path, column, text_field, bad)


def arrow_sections(path: Path, text_field: str, bad: BadLines) -> Iterator[Section]:
    """The documents of an Arrow file, in the format for files or that for streams, which `save_to_disk` writes."""
    check_arrow(path)
    import pyarrow

    with library_errors(f"cannot read {path}"), open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        source = pyarrow.memory_map(str(path))
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        column = column_of(path, text_field, reader.schema.names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    with source:
        yield from _batch_sections(batches, path, column, text_field, bad)


def column_of(path: Path, text_field: str, columns: list[str]) -> str:
    """The column that a field is in: `a.b` is in `a`, unless there is one of that very name."""
    column = text_field if text_field in columns else text_field.partition(".")[0]
    check_column(path, column, columns)
    return column


def _batch_sections(
    batches: Iterator[Any], path: Path, column: str, text_field: str, bad: BadLines
) -> Iterator[Section]:
    number = 0
    while True:
        with library_errors(f"cannot read {path}, behind row {number:,}"):
            batch = next(batches, None)
            values = None if batch is None else batch.column(batch.schema.get_field_index(column))
        if values is None:
            return
        for value in values:
            number += 1
            yield from field_text({column: value.as_py()}, text_field, f"{path}, row {number}", bad)
