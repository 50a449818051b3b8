"""The schedule's exact values, and what it says when its parts do not fit."""

import logging
import math
from typing import Any

import pytest

from core.config.errors import UserError
from core.config.validate import validate
from core.optim.schedule import Schedule


def factors(steps: int, n: int | None = None, **settings: Any) -> list[float]:
    schedule = Schedule.Config(**settings).build(steps=steps)
    return [schedule.factor(step) for step in range(1, (n or steps) + 1)]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What this project's logger says, whatever an earlier test did to it."""
    monkeypatch.setattr(logging.getLogger("armature"), "propagate", True)
    return caplog


def test_everything_after_the_warm_up_decays_by_default() -> None:
    expected = [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert factors(10, warmup_steps=2) == pytest.approx(expected)


def test_a_share_decays() -> None:
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert factors(10, warmup_steps=2, decay_ratio=0.5) == pytest.approx(expected)


def test_warm_up_longer_than_the_run_is_cut(log: pytest.LogCaptureFixture) -> None:
    assert factors(5, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert log.messages == [
        "the learning rate rises for 10 steps, lr_scheduler.warmup_steps, and there are 5: it rises faster, for all of "
        "them, and never falls; use --lr_scheduler.warmup_steps 0, or more steps"
    ]


def test_decay_that_overlaps_the_warm_up_is_cut(log: pytest.LogCaptureFixture) -> None:
    expected = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert factors(10, warmup_steps=5, decay_ratio=0.8) == pytest.approx(expected)
    assert log.messages == [
        "of 10 steps the learning rate rises for 5, lr_scheduler.warmup_steps, and falls for 5; "
        "lr_scheduler.decay_ratio 0.8 asks for 8"
    ]


def test_a_run_that_goes_on_at_a_rate_of_zero_says_so(log: pytest.LogCaptureFixture) -> None:
    factors(12, warmup_steps=2, total_steps=10, min_lr_factor=0.1)
    assert log.messages == []
    factors(12, warmup_steps=2, total_steps=10)
    words = "the learning rate is 0 after step 10, lr_scheduler.total_steps, and the run has 12: nothing is learned in"
    assert log.messages == [f"{words} the last 2"]


def test_what_fits_is_not_warned_about(log: pytest.LogCaptureFixture) -> None:
    factors(10, warmup_steps=5, decay_ratio=0.5)
    assert log.messages == []


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("low", [0.0, 0.2])
def test_shapes(decay_type: str, low: float) -> None:
    """Ten steps of decay after ten of plateau: the last is the tenth of eleven points from the peak to the minimum."""
    shapes = {
        "linear": lambda p: 1 - p,
        "sqrt": lambda p: 1 - p**0.5,
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    }
    expected = [1.0] * 11 + [low + (1 - low) * shapes[decay_type](i / 10) for i in range(1, 10)]
    found = factors(20, warmup_steps=0, decay_ratio=0.5, decay_type=decay_type, min_lr_factor=low)
    assert found == pytest.approx(expected)


def test_the_minimum_is_reached_one_step_after_the_run_and_kept() -> None:
    settings = {"warmup_steps": 2, "min_lr_factor": 0.2}
    assert factors(10, n=13, **settings)[10:] == pytest.approx([0.2, 0.2, 0.2])
    assert 0.1 * factors(10, n=11, **settings)[-1] == pytest.approx(0.02)


def test_without_decay_the_peak_is_kept() -> None:
    assert factors(6, n=7, warmup_steps=2, decay_ratio=0.0) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1])


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    assert factors(4, warmup_steps=0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])


def test_length_of_the_schedule_may_differ_from_that_of_the_run() -> None:
    whole = factors(10, warmup_steps=2)
    assert factors(6, warmup_steps=2, total_steps=10) == whole[:6]
    assert factors(12, warmup_steps=2, total_steps=10) == pytest.approx([*whole, 0, 0])


def test_the_inverse_root_falls_from_where_it_begins_and_has_no_end() -> None:
    """Four steps of warm-up; the fifth is at the peak, the twentieth at half of it, whatever the length of the run."""
    expected = [0.25, 0.5, 0.75, 1.0, *((5 / step) ** 0.5 for step in range(5, 21))]
    settings = {"warmup_steps": 4, "decay_type": "inverse_sqrt"}
    assert factors(20, **settings) == pytest.approx(expected) and expected[-1] == 0.5
    assert factors(10, n=20, **settings) == factors(20, **settings)
    assert factors(20, min_lr_factor=0.2, **settings)[-1] == pytest.approx(0.2 + 0.8 * 0.5)


def test_the_picture_and_the_words_of_a_schedule() -> None:
    schedule = Schedule.Config(warmup_steps=4, decay_ratio=0.4, min_lr_factor=0.2).build(steps=20)
    assert schedule.picture(20, width=40) == [
        "   ###########",
        "  ##############",
        " ##################",
        "####################",
    ]
    assert schedule.picture(20, width=5) == [" ##", " ###", " ###", "#####"]  # of steps 1, 6, 10, 15 and 20
    assert schedule.words(4e-3) == "up to 0.004, down to 0.0008 (linear)"
    assert Schedule.Config(decay_ratio=0.0, warmup_steps=0).build(steps=9).words(1e-3) == "up to 0.001"


def test_a_step_needs_no_other_step() -> None:
    schedule = Schedule.Config(warmup_steps=3, decay_ratio=0.3).build(steps=10)
    backwards = [schedule.factor(step) for step in range(10, 0, -1)]
    assert backwards[::-1] == factors(10, warmup_steps=3, decay_ratio=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps: warmup_steps -1 must not be negative"),
        ({"total_steps": 0}, "total_steps: total_steps 0 must be at least 1"),
        ({"decay_ratio": 1.5}, "decay_ratio: decay_ratio 1.5 must be between 0 and 1"),
        ({"min_lr_factor": -0.1}, "min_lr_factor: min_lr_factor -0.1 must be between 0 and 1"),
        ({"decay_type": "exponential"}, "decay_type: expected 'linear' or 'sqrt' or 'cosine' or 'inverse_sqrt'"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Schedule.Config(**change))
