"""Files that somebody else may have made, read with bounds: a pipe, a folder or a huge file is one line."""

import stat
from pathlib import Path

from core.config.errors import UserError


def read_bytes(path: str | Path, most_mib: int) -> bytes:
    """The bytes of a file. Raises `UserError`, which names the file, when it cannot be read or is longer."""
    data = None
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for its writer
            with open(path, "rb") as file:
                data = file.read(most_mib * 2**20 + 1)
    except (OSError, ValueError) as error:  # the latter for a path with a zero byte in it
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data is None:
        raise UserError(f"{path} is no regular file")
    if len(data) > most_mib * 2**20:
        raise too_long(path, most_mib)
    return data


def read_text(path: str | Path, most_mib: int) -> str:
    """The text of a file; errors as in `read_bytes`, and for what is not UTF-8. A byte order mark is no part of it."""
    return decode_utf8(read_bytes(path, most_mib), path)


def decode_utf8(data: bytes, name: object) -> str:
    """The text that these bytes, which an error calls `name`, stand for; raises `UserError` where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte {error.start:,} is {data[error.start]:#04x}") from None


def too_long(name: object, most_mib: int) -> UserError:
    return UserError(f"{name} has more than {most_mib} MiB: it is not what it should be")
