"""What a user did wrong, told so that it can be mended: the message, the nearest right name, the end of the program."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the user: its message says what is wrong, with the numbers or names, and what mends it."""


def joined(problems: Iterable[tuple[str, str]]) -> UserError:
    """One error for many problems: a line `path: message` for each, or the message alone where the path is empty."""
    return UserError("\n".join(f"{path}: {message}" if path else message for path, message in problems))


def did_you_mean(wrong: str, names: Iterable[str], n: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean a, b or c?` for the `n` names most like the wrong one, if they are at least `cutoff` of 1 alike."""
    *others, last = get_close_matches(wrong, list(names), n, cutoff) or [""]
    return f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if last else ""


@contextmanager
def exit_plainly() -> Iterator[None]:
    """End the program without a traceback where the user made a mistake or pressed Ctrl-C inside.

    A `UserError` is printed as `error: ...` on standard error and gives code 2, Ctrl-C gives code 130. Any other
    exception is a defect and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print("error: " + str(error).replace("\n", "\n       "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
