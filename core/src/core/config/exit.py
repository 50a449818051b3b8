"""How a program ends: its last words, and its exit code."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from core.config.console import LAUNCHERS, hold_console
from core.config.errors import LostRank, UserError

LAUNCHER_PATIENCE_S = 3.0  # in which a launcher, hearing of the rank that failed first, ends the others


@contextmanager
def exit_plainly() -> Iterator[None]:
    """End the program without a traceback where the user made a mistake or pressed Ctrl-C inside.

    No console keeps it from its work (`hold_console`). A `UserError` is printed as `error: ...` on standard error and
    gives code 2, Ctrl-C gives code 130. Any other exception is a defect and keeps its traceback.

    Of several ranks only some need to speak. A mistake is told at once by the first rank of each machine; the others
    give it a moment, in which the launcher ends them if the first had the same to say; torchrun finds their words
    anyway. A rank that another one ended (`LostRank`) waits longer, so that the launcher sees the other's code first,
    and then has code 1.
    """
    hold_console()
    rank, leads = speaker(os.environ)
    try:
        yield
    except UserError as error:
        words = indented(f"error{rank}: {error}")
        tell_torchrun(words)
        if not leads:
            time.sleep(LAUNCHER_PATIENCE_S)
        print(words, file=sys.stderr, flush=True)
        sys.exit(2)
    except LostRank as error:
        time.sleep(2 * LAUNCHER_PATIENCE_S)  # behind the rank that it lost, which may wait as long and then has to end
        say_last(f"error{rank}: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        if leads:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        tell_torchrun(traceback.format_exc())
        raise


def end_at_once(text: str) -> NoReturn:
    """End the process from any thread, with code 1, for the reason that is printed. Nothing is cleaned up."""
    say_last(f"error{speaker(os.environ)[0]}: {text}")
    os._exit(1)


def say_last(text: str) -> None:
    """Print the last words of this process, and leave them to its launcher."""
    text = indented(text)
    print(text, file=sys.stderr, flush=True)
    tell_torchrun(text)


def indented(text: str) -> str:
    """The text with all lines but the first further in."""
    return text.replace("\n", "\n       ")


def speaker(environ: Mapping[str, str]) -> tuple[str, bool]:
    """` (rank 1 of 8)`, or nothing for a process alone; and whether this is the first rank of its machine."""
    for number, size, local in LAUNCHERS:
        if environ.get(size, "1") != "1":
            return f" (rank {environ.get(number, '?')} of {environ[size]})", environ.get(local, "0") == "0"
    return "", True


def tell_torchrun(text: str) -> None:
    """Leave the last words of this process where torchrun looks for them, which closes with those of the first rank."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the same words went to standard error
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))
