"""How a program ends: its last words, and its exit code."""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from core.config.console import LAUNCHERS, hold_console
from core.config.errors import UserError

LOST = re.compile("closed by peer|reset by peer|pair closure|broken pipe", re.IGNORECASE)
"""What gloo says in a rank that misses another one, which failed first."""
PATIENCE_S = 3.0  # in which a launcher, hearing of the rank that failed first, ends the others


@contextmanager
def exit_plainly() -> Iterator[None]:
    """End the program without a traceback where the user made a mistake or pressed Ctrl-C inside.

    No console keeps it from its work (`hold_console`). A `UserError` is printed as `error: ...` on standard error and
    gives code 2, Ctrl-C gives code 130. Any other exception is a defect and keeps its traceback.

    Of several ranks only some need to speak. A mistake is told at once by the first rank of each machine; the others
    give it a moment, in which the launcher ends them if the first had the same to say. So does a rank that misses
    another one, which failed first and knows why.
    """
    hold_console()
    rank, leads = speaker(os.environ)
    try:
        yield
    except UserError as error:
        if not leads:
            time.sleep(PATIENCE_S)
        text = f"error{rank}: " + str(error).replace("\n", "\n       ")
        print(text, file=sys.stderr, flush=True)
        tell_torchrun(text)
        sys.exit(2)
    except KeyboardInterrupt:
        if leads:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if rank and LOST.search(str(error)):
            time.sleep(PATIENCE_S)
        tell_torchrun(traceback.format_exc())
        raise


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
