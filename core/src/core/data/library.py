"""Errors of other people's libraries that read files of other people: one line, whatever the library raises."""

from collections.abc import Iterator
from contextlib import contextmanager

from core.config.errors import UserError

_CHARACTERS = 300


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What a library raises inside, told in one line that begins with `what`.

    The libraries here state no classes of errors, and a panic of one that is written in Rust is no `Exception`.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())
        short = f"{said[:_CHARACTERS]}..." if len(said) > _CHARACTERS else said
        raise UserError(f"{what}: {short or type(error).__name__}") from error
