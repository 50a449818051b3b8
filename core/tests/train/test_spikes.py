"""Steps that stand out are left out, counted, reported and remembered; against means and deviations of `statistics`."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import toy_run

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.validate import validate
from core.step.settings import Debug
from core.step.spikes import SpikeDetector
from core.train.trainer import Trainer


def test_a_spike_is_told_by_its_z_score() -> None:
    detector = SpikeDetector(Debug(on_spike="skip", spike_z_score=3.0, spike_window=5))
    losses = [4.0, 3.5, 3.7, 3.2, 3.4]
    assert not any(detector.spike(loss, 1.0) for loss in losses), "the window was not full"
    mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
    assert detector.spike(mean + 3.01 * deviation, 1.0).startswith("loss 4.3")
    losses = [*losses[1:], mean + 3.01 * deviation]
    mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
    assert detector.spike(mean + 2.99 * deviation, 1.0) == "" and detector.spike(0.0, 1.0) == ""


def test_equal_numbers_and_a_detector_that_is_off_find_nothing() -> None:
    for settings in (Debug(on_spike="skip", spike_window=2), Debug(spike_window=2)):
        detector = SpikeDetector(settings)
        assert not any(detector.spike(1.0, norm) for norm in (1.0, 1.0, 1.0, 100.0))


def spiky_run(folder: Path) -> Trainer.Config:
    run = toy_run(folder, steps=9)
    run.debug.on_spike, run.debug.spike_window, run.debug.spike_z_score = "skip", 4, 500.0
    run.checkpoint = Checkpoint(enable=True, interval=3)
    return run


def go(run: Trainer.Config, spike: int) -> dict[str, torch.Tensor]:
    """Train with a gradient norm that is far too large in step `spike`; the weights after it."""
    trainer: Trainer = run.build()
    step = trainer.step
    at = 0

    def watched(number: int) -> Any:
        nonlocal at
        at = number
        return step(number)

    trainer.step = watched
    norm = trainer.built.models[0].norm
    assert norm is not None
    norm.weight.register_hook(lambda gradient: gradient * 1e6 if at == spike else gradient)
    trainer.run()
    return {name: weight.detach().clone() for name, weight in trainer.built.named_parameters()}


def test_a_spike_is_left_out_counted_and_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = spiky_run(tmp_path)
    whole = go(run, spike=7)
    assert "warning: step 7 left out: grad_norm " in capsys.readouterr().out
    records = [json.loads(line) for line in Path(f"{run.dump_folder}/metrics.jsonl").read_text().splitlines()]
    assert [record.get("skipped_steps", 0) for record in records] == [0] * 6 + [1] * 3
    again = spiky_run(tmp_path)
    again.dump_folder = str(tmp_path / "again")
    again.checkpoint.initial_load_path = f"{run.dump_folder}/checkpoint/step-6"
    again.checkpoint.initial_load_model_only = False
    resumed = go(again, spike=7)  # the window of four steps came with the checkpoint
    assert "warning: step 7 left out: grad_norm " in capsys.readouterr().out
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spike_z_score": 0.0}, "spike_z_score: spike_z_score 0.0 must be a finite number above 0"),
        ({"spike_window": 1}, "spike_window: spike_window 1 must be at least 2"),
    ],
)
def test_settings_of_spikes_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Debug(**settings))
