"""The bytes of a file, whatever it is compressed with."""

import bz2
import gzip
import importlib.util
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from core.config.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
"""What a file of any format that is read from front to back may end in."""


def check_arrow(path: Path) -> None:
    """Raise `UserError` where the package that reads the file is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} needs the package pyarrow: in the checkout run pip install './core[data]'")


class Place:
    """How far a file is read, in bytes on the disk."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        """What is read; whoever opens it states it."""

    @property
    def n_bytes(self) -> int:
        return 0 if self.file is None or self.file.closed else self.file.tell()


@contextmanager
def open_bytes(path: Path, place: Place | None = None) -> Iterator[IO[bytes]]:
    """A file that is read from front to back; one that is cut off is an `OSError` or an `EOFError` at its end.

    A file of several members or frames, one behind the other, is read to the end of the last.
    """
    suffix = path.suffix.lower()
    with open(path, "rb") as packed:
        if place is not None:
            place.file = packed
        if suffix == ".zst":
            check_arrow(path)
            import pyarrow

            stream: Any = pyarrow.CompressedInputStream(packed, "zstd")
            with io.BufferedReader(stream) as file:
                yield file
            return
        opened: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix)
        if opened is None:
            yield packed
            return
        with opened(packed, "rb") as file:
            yield file
