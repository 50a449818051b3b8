import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import toy_run

from core.runtime.log import events_to
from core.step.update import StepInfo, left_out


def events_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_writes_its_starts_saves_and_ends(tmp_path):
    for steps in (2, 4):
        run = toy_run(tmp_path, steps=steps)
        run.checkpoint.enable, run.checkpoint.interval = True, 2
        run.build().run()
    events = events_in(tmp_path / "run")
    assert [(event["event"], event["step"], event["text"].partition(" (")[0]) for event in events] == [
        ("start", 0, "began"),
        ("checkpoint", 2, "saved checkpoint/step-2"),
        ("end", 2, "finished 2 steps"),
        ("start", 2, "went on"),
        ("checkpoint", 4, "saved checkpoint/step-4"),
        ("end", 4, "finished 4 steps"),
    ]
    assert events[0]["system"]["torch"] == torch.__version__ and events[0]["system"]["ranks"] == "1"
    steps, rates = zip(*events[3]["schedule"], strict=True)
    assert steps == (1, 2, 3, 4) and rates == pytest.approx([0.005, 0.01, 0.01, 0.005])  # 2 steps up, 2 down to 0
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_a_step_that_is_left_out_is_an_event_and_other_messages_are_none(tmp_path):
    with events_to(tmp_path / "events.jsonl"):
        left_out(StepInfo(7, 1.0, 1.0, 1.0, updated=True), "a spike", None)
        logging.getLogger("armature").warning("something else")
    (event,) = events_in(tmp_path)
    assert event.pop("time") > 0 and event == {"event": "skipped", "step": 7, "text": "step 7 left out: a spike"}
