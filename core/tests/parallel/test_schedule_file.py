"""Schedules from files: all of PyTorch's are read, and none that a run would not survive."""

import random
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining.schedules import get_schedule_class

from core.config.errors import UserError
from core.parallel.schedule_file import Actions, read_schedule

LOOPED = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble"]
V_SHAPED = ["ZBVZeroBubble", "DualPipeV"]


class Named:
    """A stage as far as a schedule looks at it when it is made."""

    def __init__(self, number: int, degree: int) -> None:
        n = 2 * degree
        self.stage_index, self.group_rank, self.num_stages, self.group_size = number, 0, n, degree
        self.is_first, self.is_last, self.has_backward = number == 0, number == n - 1, True
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.submod, self.device = torch.nn.Identity(), torch.device("cpu")


def written(file: Path, schedule: str, degree: int, n_microbatches: int) -> str:
    """A schedule of PyTorch's in a file."""
    second = 2 * degree - 1 if schedule in V_SHAPED else degree
    made = get_schedule_class(schedule)([Named(0, degree), Named(second, degree)], n_microbatches=n_microbatches)  # pyrefly: ignore[bad-argument-type]
    made._dump_csv(str(file), format="compute_only")  # pyrefly: ignore[missing-attribute]
    return file.read_text()


@pytest.mark.parametrize("schedule", LOOPED + V_SHAPED)
@pytest.mark.parametrize(("degree", "n_microbatches"), [(2, 4), (2, 8), (4, 8)])
def test_every_schedule_of_pytorchs_is_read(tmp_path: Path, schedule: str, degree: int, n_microbatches: int) -> None:
    written(tmp_path / "file.csv", schedule, degree, n_microbatches)
    stages = [[rank, 2 * degree - 1 - rank if schedule in V_SHAPED else degree + rank] for rank in range(degree)]
    two_parts = schedule not in ("LoopedBFS", "Interleaved1F1B")
    assert read_schedule(str(tmp_path / "file.csv")) == Actions(stages, n_microbatches, two_parts)


GOOD = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD.replace("0B1", ""), "here 1 x 0F1, 0 x 0B1, 0 x 0I1, 0 x 0W1"),
        (GOOD.replace("0B1", "0I1"), "here 1 x 0F1, 0 x 0B1, 1 x 0I1, 0 x 0W1"),
        (GOOD.replace("0B1", "0B1,0B1"), "here 1 x 0F1, 2 x 0B1, 0 x 0I1, 0 x 0W1"),
        (GOOD.replace("0F0,0F1", "0F1,0F1"), "once, here 0 x 0F0"),
        (GOOD.replace("1F0", "1F0,0F5"), "stage 0 is in rows 1 and 2"),
        (GOOD.replace("0F1", "0F999999"), "2 stages and 1000000 microbatches are not all in it"),
        (GOOD.replace("0F1", "999999F1"), "1000000 stages and 2 microbatches are not all in it"),
        (GOOD.replace("0F1", "9" * 5000 + "F1"), "'9{40}' is no action"),
        (GOOD.replace("0F1", "0F1 and more"), "'0F1 and more' is no action"),
        (GOOD.replace("0F1", "0X1"), "'0X1' is no action"),
        (GOOD.replace("0F1", "(0F1;0B0"), r"'\(0F1;0B0' is no action"),
        (GOOD.replace("0F1", "(0F1;0B0;0B1)OVERLAP_F_B"), "is no action"),
        (GOOD.replace("0F1", "\u0660F1"), "is no action"),
        (GOOD.replace("\n", "\n\n"), "row 2 is empty"),
        ("", "it is empty"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "wait for one another for ever: row 1 at 0B0, row 2 at 1F1"),
        (GOOD.replace("0F0,0F1,,0B0", "0B0,0F0,0F1,"), "wait for one another for ever: row 1 at 0B0"),
    ],
)
def test_a_schedule_that_no_run_survives(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    assert read_schedule(str(tmp_path / "good.csv")) == Actions([[0], [1]], 2, False)
    (tmp_path / "file.csv").write_text(text)
    with pytest.raises(UserError, match="file.csv is no schedule: every row needs actions such as 0F0") as error:
        read_schedule(str(tmp_path / "file.csv"))
    assert re.search(why, str(error.value)), error.value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"0F0,\xff\n", "is not UTF-8: byte 4 is 0xff"),
        (b'0F0,"0B0\n', "is no table of comma-separated values"),
        (b"0" * 200_000, "is no table of comma-separated values"),
        (b"0F0\x00,", "is no action|comma-separated"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "file.csv").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_schedule(str(tmp_path / "file.csv"))


def simulated(rows: list[list[str]]) -> bool:
    """Whether ranks that take turns get to their ends: a second opinion, by messages that are sent and waited for."""
    n_stages = 1 + max(int(cell[: re.search(r"[FBIW]", cell).start()]) for row in rows for cell in row)  # pyrefly: ignore[missing-attribute]
    sent: set[str] = {f"activations of {m} for 0" for m in range(99)} | {
        f"gradients of {m} for {n_stages - 1}" for m in range(99)
    }
    own: set[str] = set()
    queues = [list(row) for row in rows]
    for _ in range(sum(map(len, rows)) + 1):
        for queue in queues:
            if not queue:
                continue
            stage, kind, microbatch = re.fullmatch(r"(\d+)([FBIW])(\d+)", queue[0]).groups()  # pyrefly: ignore[missing-attribute]
            if kind == "F" and f"activations of {microbatch} for {stage}" in sent:
                sent.add(f"activations of {microbatch} for {int(stage) + 1}")
                own.add(f"{stage}F{microbatch}")
            elif kind in "BI" and f"gradients of {microbatch} for {stage}" in sent and f"{stage}F{microbatch}" in own:
                sent.add(f"gradients of {microbatch} for {int(stage) - 1}")
                own.add(f"{stage}I{microbatch}")
            elif not (kind == "W" and f"{stage}I{microbatch}" in own):
                continue
            queue.pop(0)
    return not any(queues)


def test_orders_that_end_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    draw = random.Random(1)
    n_ended = 0
    file = tmp_path / "file.csv"
    for schedule in LOOPED + ["ZBVZeroBubble"]:
        text = written(file, schedule, 2, 4)
        for _ in range(60):
            rows = [[cell for cell in row.split(",") if cell] for row in text.split()]
            for _ in range(draw.randrange(1, 3)):
                row = draw.choice(rows)
                at = draw.randrange(len(row) - 1)
                row[at], row[at + 1] = row[at + 1], row[at]
            file.write_text("".join(",".join(row) + "\n" for row in rows))
            ends = simulated(rows)
            if not ends:
                with pytest.raises(UserError, match="would wait for one another for ever"):
                    read_schedule(str(file))
            else:
                read_schedule(str(file))
            n_ended += ends
    assert 60 < n_ended < 200
