"""A pipeline schedule from a file: a row for each rank, and in it what the rank computes, one action after another."""

import csv
import re
from collections import Counter
from io import StringIO
from typing import NamedTuple

from core.config.errors import UserError
from core.config.text_file import read_text

MOST_SCHEDULE_MIB = 16
ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})", re.ASCII)
OVERLAPPED = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")


class Actions(NamedTuple):
    """What a schedule from a file computes: the stages of every rank, the number of microbatches, and whether a
    backward comes in two parts."""

    stages: list[list[int]]
    n_microbatches: int
    in_two_parts: bool


class StagePass(NamedTuple):
    """The forward (F) or backward (B) of a microbatch in a stage, or the part of a backward that is for the stage's
    input (I) or weights (W)."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def read_schedule(file: str) -> Actions:
    """A schedule as PyTorch's `_dump_csv` writes it with the format compute_only: a row for each rank, and in it
    actions such as 0F3, the forward of microbatch 3 in stage 0.

    Raises `UserError` for a file that is none, or whose ranks would wait for one another for ever.
    """
    try:
        rows = list(csv.reader(StringIO(read_text(file, MOST_SCHEDULE_MIB)), strict=True))
    except csv.Error as error:
        raise UserError(f"{file} is no table of comma-separated values: {error}") from error
    ranks = [[action for cell in row for action in actions_of(cell.strip(), file)] for row in rows]
    if not ranks or not all(ranks):
        raise no_schedule(file, f"row {ranks.index([]) + 1} is empty" if ranks else "it is empty")
    check_complete(ranks, file)
    check_order(ranks, file)
    actions = [action for row in ranks for action in row]
    return Actions(
        [sorted({action.stage for action in row}) for row in ranks],
        1 + max(action.microbatch for action in actions),
        any(action.kind in "IW" for action in actions),
    )


def actions_of(cell: str, file: str) -> list[StagePass]:
    """What a cell says is done: nothing, an action, or a forward and a backward that overlap."""
    both = OVERLAPPED.fullmatch(cell)
    found = [ACTION.fullmatch(text.strip()) for text in (both.groups() if both else [cell] if cell else [])]
    if None in found:
        raise no_schedule(file, f"{cell[:40]!r} is no action")
    return [
        StagePass(int(stage), kind, int(microbatch)) for stage, kind, microbatch in (m.groups() for m in found if m)
    ]


def no_schedule(file: str, why: str) -> UserError:
    return UserError(
        f"{file} is no schedule: every row needs actions such as 0F0 or 1B3, and no communication; it is as PyTorch "
        f'writes it with format="compute_only", and {why}'
    )


def check_complete(ranks: list[list[StagePass]], file: str) -> None:
    """Raise `UserError` where a stage lies on two ranks, or does not do all that a training step needs of it once."""
    homes: dict[int, int] = {}
    counts = Counter(action for row in ranks for action in row)
    for rank, row in enumerate(ranks):
        for action in row:
            if homes.setdefault(action.stage, rank) != rank:
                raise no_schedule(file, f"stage {action.stage} is in rows {homes[action.stage] + 1} and {rank + 1}")
    n_stages, n_microbatches = 1 + max(homes), 1 + max(action.microbatch for action in counts)
    if len(counts) > 3 * len(homes) * n_microbatches or n_stages * n_microbatches > len(counts):
        raise no_schedule(file, f"{n_stages} stages and {n_microbatches} microbatches are not all in it")
    for stage in range(n_stages):
        for microbatch in range(n_microbatches):
            n = {kind: counts[StagePass(stage, kind, microbatch)] for kind in "FBIW"}
            if n["F"] != 1 or (n["B"], n["I"], n["W"]) not in ((1, 0, 0), (0, 1, 1)):
                found = ", ".join(f"{count} x {stage}{kind}{microbatch}" for kind, count in n.items())
                raise no_schedule(file, f"a stage does F and B, or F, I and W, of a microbatch once, here {found}")


def check_order(ranks: list[list[StagePass]], file: str) -> None:
    """Raise `UserError` where ranks that do one action after another come to one that waits for what is never done."""
    last = max(action.stage for row in ranks for action in row)
    done: set[StagePass] = set()
    places = [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(ranks):
            while places[rank] < len(row) and needs(row[places[rank]], last, done):
                done.add(row[places[rank]])
                places[rank] += 1
                moved = True
    waiting = [f"row {rank + 1} at {ranks[rank][at]}" for rank, at in enumerate(places) if at < len(ranks[rank])]
    if waiting:
        raise no_schedule(file, f"its ranks would wait for one another for ever: {', '.join(waiting[:4])}")


def needs(action: StagePass, last: int, done: set[StagePass]) -> bool:
    """Whether what an action needs is done: the forward before it, the backward behind it, its own other part."""
    stage, kind, microbatch = action
    if kind == "F":
        return stage == 0 or StagePass(stage - 1, "F", microbatch) in done
    if kind == "W":
        return StagePass(stage, "I", microbatch) in done
    own = StagePass(stage, "F", microbatch) in done
    return own and (stage == last or any(StagePass(stage + 1, part, microbatch) in done for part in "BI"))
