"""Which blocks a stage has, which stages a rank has, and which pipelines are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import get_schedule_class

from core.nn.decoder import Decoder
from core.parallel.pipeline import (
    checkpoint_problem,
    cut_stage,
    n_stages,
    pipeline_problems,
    split_layers,
    stages_of,
)
from core.parallel.schedule_file import read_schedule
from core.parallel.settings import SINGLE_STAGE, Parallelism
from core.runtime.meta import meta_model
from core.testing.layout_suite import SCHEDULES, assert_equal, degrees
from core.testing.parity import Case, compare
from core.testing.toy import Toy, on_cpu


def piped(degree: int, schedule: str = "1F1B", **more: Any) -> Parallelism:
    return degrees(pipeline=degree, schedule=schedule, **{f"pipeline_parallel_{name}": v for name, v in more.items()})


def sizes(settings: Parallelism, n_layers: int) -> list[int]:
    return [len(blocks) for blocks in split_layers(settings, n_layers)]


def problems(settings: Parallelism, n_layers: int = 8, n_microbatches: int = 8) -> list[tuple[str, str]]:
    return list(pipeline_problems(settings, n_layers, n_microbatches))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("n_layers", [6, 7, 8, 9, 61])
def test_every_block_has_one_stage_and_every_stage_one_rank(schedule: str, degree: int, n_layers: int) -> None:
    settings = piped(degree, schedule)
    stages = split_layers(settings, n_layers)
    assert [i for blocks in stages for i in blocks] == list(range(n_layers))
    held = [stages_of(rank, settings, n_layers) for rank in range(degree)]
    assert sorted(number for numbers in held for number in numbers) == list(range(len(stages)))
    each = 1 if schedule in SINGLE_STAGE else 2
    assert {len(numbers) for numbers in held} == {each} and len(stages) == n_stages(settings, n_layers) == degree * each
    weights = [len(blocks) for blocks in stages]
    weights[0] += 1  # the embedding
    weights[-1] += 1  # norm and head
    assert max(weights) - min(weights) <= 1


def test_even_stages_count_the_ends_as_blocks() -> None:
    assert split_layers(piped(2), 8) == [range(4), range(4, 8)]
    assert sizes(piped(2), 7) == [4, 3]
    assert sizes(piped(4), 8) == [2, 3, 2, 1]
    assert sizes(piped(2, "Interleaved1F1B"), 2) == [0, 1, 1, 0]
    assert sizes(piped(2, "LoopedBFS", layers_per_stage=2), 9) == [1, 2, 2, 2, 2, 0]


def test_stages_that_are_said() -> None:
    assert split_layers(piped(2, split=[3]), 8) == [range(3), range(3, 8)]
    assert split_layers(piped(2, "LoopedBFS", split=[0, 5, 8]), 8) == [range(0), range(5), range(5, 8), range(8, 8)]


def test_stages_lie_in_a_loop_or_in_a_v() -> None:
    loop, vee = piped(3, "Interleaved1F1B", layers_per_stage=1), piped(3, "ZBVZeroBubble")
    assert [stages_of(rank, loop, 7) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert [stages_of(rank, vee, 7) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("settings", "n_layers", "field", "words"),
    [
        (
            piped(2, layers_per_stage=3),
            8,
            "layers_per_stage",
            "4 stages on 2 pipeline ranks: schedule 1F1B wants exactly 1",
        ),
        (piped(2, "Interleaved1F1B", layers_per_stage=5), 8, "layers_per_stage", "2 stages on 2 .* at least 2"),
        (piped(2, "LoopedBFS", layers_per_stage=2), 8, "layers_per_stage", "5 stages on 2 .* at least 2"),
        (piped(2, "DualPipeV", layers_per_stage=1), 6, "layers_per_stage", "8 stages on 2 .* exactly 2"),
        (piped(2, split=[2, 4, 6]), 8, "split", "4 stages on 2 pipeline ranks: schedule 1F1B wants exactly 1"),
        (piped(8, "ZBVZeroBubble"), 8, "layers_per_stage", "8 blocks are too few for 16 stages: use fewer stages"),
        (piped(3, split=[5, 3]), 8, "split", r"pipeline_parallel_split \[5, 3\] must rise, from 0 .* to .* 8 at most"),
        (piped(3, split=[3, 3]), 8, "split", "must rise"),
        (piped(2, split=[9]), 8, "split", r"\[9\] must rise"),
        (piped(2, split=[-1]), 8, "split", r"\[-1\] must rise"),
    ],
)
def test_stages_that_do_not_fit(settings: Parallelism, n_layers: int, field: str, words: str) -> None:
    ((found, message),) = problems(settings, n_layers)
    assert found == f"pipeline_parallel_{field}"
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("settings", "n_microbatches", "words"),
    [
        (piped(4), 3, "3 microbatches in a step leave some of 4 pipeline ranks idle: lower"),
        (piped(2, "Interleaved1F1B"), 3, "wants the microbatches of a step (3) to be a multiple of"),
        (piped(2, "InterleavedZeroBubble"), 5, "wants the microbatches of a step (5) to be a multiple of"),
        (piped(2, "DualPipeV"), 3, "wants at least 4 microbatches in a step, there are 3"),
    ],
)
def test_microbatches_that_do_not_fit(settings: Parallelism, n_microbatches: int, words: str) -> None:
    ((field, message),) = problems(settings, n_microbatches=n_microbatches)
    assert field == "pipeline_parallel_microbatch_size" and words in message


def test_what_fits_is_not_refused() -> None:
    for schedule in SCHEDULES:
        assert not problems(piped(2, schedule), n_layers=2, n_microbatches=4)
    assert not problems(piped(2, split=[0]), n_layers=1) and not problems(piped(2, split=[8]))
    assert not problems(degrees(), n_layers=1, n_microbatches=1)


def test_a_stage_has_its_blocks_and_the_ends_theirs() -> None:
    """Run one behind the other, stages are the model."""
    config = Toy.Config(n_layers=4)
    whole = on_cpu(config)
    stages = [range(1), range(1, 3), range(3, 4)]
    parts: list[Decoder] = []
    for number in range(3):
        part = on_cpu(config)
        cut_stage(part, stages, number)
        parts.append(part)
    assert [sorted(part.layers) for part in parts] == [["0"], ["1", "2"], ["3"]]
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    tokens_BL = torch.arange(12).view(2, 6)
    x: Any = tokens_BL
    for part in parts:
        x = part(x)
    assert torch.equal(x, whole(tokens_BL))


class Named:
    """A stage as far as a schedule looks at it when it is made."""

    def __init__(self, number: int, rank: int, n: int, degree: int) -> None:
        self.stage_index, self.group_rank, self.num_stages, self.group_size = number, rank, n, degree
        self.is_first, self.is_last = number == 0, number == n - 1
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.has_backward = True
        self.submod = meta_model(Toy.Config())
        self.device = torch.device("cpu")


def written(folder: Path, schedule: str, *, form: str = "compute_only", n_microbatches: int = 4) -> Path:
    """A schedule of PyTorch's for two ranks, in a file."""
    kind: Any = get_schedule_class(schedule)
    file = folder / f"{schedule}.csv"
    made = kind([Named(i, 0, 4, 2) for i in stages_of(0, piped(2, schedule), 6)], n_microbatches=n_microbatches)
    made._dump_csv(str(file), format=form)
    return file


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_a_schedule_from_a_file_says_where_stages_lie(tmp_path: Path, schedule: str) -> None:
    file = str(written(tmp_path, schedule))
    settings = piped(2, "1F1B", schedule_csv=file)
    assert read_schedule(file).n_microbatches == 4
    for rank in range(2):
        assert stages_of(rank, settings, 6) == stages_of(rank, piped(2, schedule), 6)
    assert not problems(settings, n_layers=6, n_microbatches=4)


@pytest.mark.parametrize(
    ("settings", "n_layers", "n_microbatches", "words"),
    [
        ({}, 6, 8, "is for 4 microbatches, a step has 8: change the batch size or pipeline_parallel_microbatch_size"),
        ({}, 1, 4, "has 4 stages, too many for 1 blocks"),
        ({"degree": 3}, 6, 4, "is for 2 ranks, pipeline_parallel_degree is 3"),
        ({"split": [2, 4]}, 6, 4, "it makes 3 stages, .* has 4"),
        ({"split": [2, 9, 10]}, 6, 4, "must rise"),
    ],
)
def test_a_file_that_does_not_fit(
    tmp_path: Path, settings: dict[str, Any], n_layers: int, n_microbatches: int, words: str
) -> None:
    file = str(written(tmp_path, "LoopedBFS"))
    ((_, message),) = problems(piped(**{"degree": 2, "schedule_csv": file, **settings}), n_layers, n_microbatches)
    assert re.search(words, message), message


def test_a_file_that_is_no_schedule(tmp_path: Path) -> None:
    absent, empty, prose = tmp_path / "absent.csv", tmp_path / "empty.csv", tmp_path / "prose.csv"
    empty.write_text("")
    prose.write_text("0F0,0B0\nto be or not to be\n")
    with_sends = written(tmp_path, "LoopedBFS", form="compute_comms")
    for file, words in (
        (absent, "absent.csv cannot be read: No such file"),
        (empty, "is no schedule: every row needs actions such as 0F0"),
        (prose, "is no schedule"),
        (with_sends, 'and no communication; it is as PyTorch writes it with format="compute_only"'),
    ):
        settings = piped(2, schedule_csv=str(file))
        ((field, message),) = problems(settings)
        assert field == "pipeline_parallel_schedule_csv" and re.search(words, message), message
        assert checkpoint_problem(settings, "selective") is None


def test_a_backward_in_two_parts_is_known_from_the_file(tmp_path: Path) -> None:
    for schedule, refused in (("LoopedBFS", False), ("ZBVZeroBubble", True), ("InterleavedZeroBubble", True)):
        settings = piped(2, schedule_csv=str(written(tmp_path, schedule)))
        message = checkpoint_problem(settings, "selective")
        assert (message is not None) == refused
        assert message is None or f"{schedule}.csv computes backward in two passes" in message
        assert checkpoint_problem(settings, "full") is None


@pytest.mark.layout
@pytest.mark.parametrize(
    "schedule",
    ["ZBVZeroBubble", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("LoopedBFS", "DualPipeV"))],
)
def test_a_step_from_a_file_equals_one_rank(tmp_path: Path, schedule: str) -> None:
    file = written(tmp_path, schedule, n_microbatches=8)
    assert_equal(compare(Case(Toy.Config(n_layers=6), piped(2, schedule_csv=str(file)), 2)))
