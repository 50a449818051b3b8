"""What a user did wrong, told so that it can be mended: the message, the nearest right name, the end of the program."""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from core.config.console import hold_console

LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""What torchrun, and srun, call a rank's number, how many there are, and the number on its machine."""
LOST = re.compile("closed by peer|reset by peer|pair closure|broken pipe", re.IGNORECASE)
"""What gloo says in a rank that misses another one, which failed first."""
PATIENCE_S = 3.0  # in which a launcher, hearing of the rank that failed first, ends the others


class UserError(ValueError):
    """A mistake of the user: its message says what is wrong, with the numbers or names, and what mends it."""


def joined(problems: Iterable[tuple[str, str]]) -> UserError:
    """One error for many problems: a line `path: message` for each, or the message alone where the path is empty."""
    return UserError("\n".join(f"{path}: {message}" if path else message for path, message in problems))


def check_all(*checks: Callable[[], object]) -> None:
    """Run every check; raises one `UserError` with all that they say, each thing once."""
    said: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            said[str(error)] = None
    if said:
        raise UserError("\n".join(said))


def at_most(n: int, lines: list[str]) -> list[str]:
    """The first `n` lines, and how many more there are."""
    return [*lines[:n], f"and {len(lines) - n} more"] if len(lines) > n else lines


def did_you_mean(wrong: str, names: Iterable[str], n: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean a, b or c?` for the `n` names most like the wrong one, if they are at least `cutoff` of 1 alike."""
    *others, last = get_close_matches(wrong, list(names), n, cutoff) or [""]
    return f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if last else ""


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
