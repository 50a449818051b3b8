"""The order of a rank's passes, against the schedules of torch and against what a step must contain."""

from collections import Counter
from typing import Any

import pytest
import torch

from core.parallel.fake import fake_ranks
from core.parallel.many_ranks import ManyRanks
from core.parallel.pipeline import Pipeline, cut_stage, split_layers, stages_of
from core.parallel.settings import Parallelism
from core.plan import pipeline_passes
from core.plan.fake_step import PASSES
from core.plan.pipeline_passes import RELEASES, Action, actions
from core.runtime.meta import meta_model
from core.testing.toy import Toy

SCHEDULES = ["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
N_LAYERS, N_MICROBATCHES = 8, 8


def order_of(schedule: Any, rank: int) -> list[Action]:
    settings = Parallelism(pipeline_parallel_degree=4, pipeline_parallel_schedule=schedule)
    stages = split_layers(settings, N_LAYERS)
    with fake_ranks(4, rank):
        layout = ManyRanks(settings, torch.device("cpu"))
        models = {}
        for number in stages_of(rank, settings, N_LAYERS):
            models[number] = meta_model(Toy.Config(n_layers=N_LAYERS))
            cut_stage(models[number], stages, number)
        pipeline = layout.pipeline(models, N_MICROBATCHES)
        assert isinstance(pipeline, Pipeline)
        return actions(pipeline)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_microbatch_goes_forward_and_back_once(schedule: str):
    last = 3 if schedule in ("1F1B", "GPipe") else 7
    for rank in range(4):
        order = order_of(schedule, rank)
        assert {action.kind for action in order} <= PASSES.keys()  # a release of torch may bring kinds of its own
        own = {action.stage for action in order}
        kinds = Counter((action.kind, action.stage) for action in order)
        place = {action: i for i, action in enumerate(order)}
        for stage in own:
            assert kinds["REDUCE_GRAD", stage] == 1
            for i in range(N_MICROBATCHES):
                whole, inputs, weights = (Action(kind, stage, i) in place for kind in "BIW")
                assert whole != inputs and inputs == weights
                forward = place[Action("F", stage, i)]
                back = place[Action("B" if whole else "I", stage, i)]
                assert forward < back < place[Action("REDUCE_GRAD", stage)]
                if stage > 0 and stage - 1 not in own:
                    assert place[Action("RECV_F", stage, i)] < forward
                if stage < last and stage + 1 not in own:
                    assert place[Action("RECV_B", stage, i)] < back
                    assert (Action("WAIT_SEND_F", stage, i) in place) == RELEASES
                assert whole or place[Action("I", stage, i)] < place[Action("W", stage, i)]


@pytest.mark.parametrize(("rank", "ahead"), [(0, 4), (1, 3), (3, 1)])
def test_one_forward_one_backward_after_the_first_forwards(rank: int, ahead: int):
    passes = "".join(action.kind for action in order_of("1F1B", rank) if action.kind in "FB")
    assert passes == "F" * ahead + "BF" * (N_MICROBATCHES - ahead) + "B" * ahead


def test_all_forwards_first():
    assert "".join(action.kind for action in order_of("GPipe", 2) if action.kind in "FB") == "F" * 8 + "B" * 8


@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [("1F1B", "rF rFw rFw w bB rF w bB"), ("GPipe", "rF rF rF rF rF rF rF rF wwwwwwww bB bB")],
)
def test_room_for_messages_is_made_and_given_back_where_the_schedule_does(
    monkeypatch: pytest.MonkeyPatch, schedule: str, kinds: str
):
    """r and b receive, w waits for what was sent: in the second of four stages."""
    monkeypatch.setattr(pipeline_passes, "RELEASES", True)
    letters = {"RECV_F": "r", "RECV_B": "b", "WAIT_SEND_F": "w"}
    order = order_of(schedule, 1)
    expected = kinds.replace(" ", "")
    assert "".join(letters.get(action.kind, action.kind) for action in order)[: len(expected)] == expected
    waits = [action.microbatch for action in order if action.kind == "WAIT_SEND_F"]
    assert waits == list(range(N_MICROBATCHES))
