"""What a user did wrong, told so that it can be fixed: the message, and the nearest right name."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches

MOST_LINES = 20
"""Of one error; a section in the place of another has dozens of fields that it should not have."""


class UserError(ValueError):
    """A mistake of the user: its message says what is wrong, with the numbers or names, and what fixes it."""


class OtherFamily(UserError):
    """A published model is of another family than it was read as."""


class LostRank(RuntimeError):
    """Another rank ended the run: its message says which, and why."""


def joined(problems: Iterable[tuple[str, str]]) -> UserError:
    """One error for many problems: a line `path: message` for each of the first `MOST_LINES`, or the message alone
    where the path is empty."""
    lines = [f"{path}: {message}" if path else message for path, message in problems]
    return UserError("\n".join(at_most(MOST_LINES, lines)))


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
