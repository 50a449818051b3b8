"""The folder of a run: whose it is, what it holds, and that nobody else is in it."""

import json
from pathlib import Path

import pytest

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.train.folder import check_run_folder, make_run_folder
from core.train.records import carry_on

OURS = {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_MAX_RESTARTS": "2"}
NONE = Checkpoint()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def measured(folder: Path, *steps: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def test_every_attempt_goes_on_in_the_folder_and_keeps_what_was_measured(tmp_path):
    folder = tmp_path / "run"
    for attempt in range(3):
        check_run_folder(str(folder), NONE, OURS)
        assert make_run_folder(str(folder), "toy", OURS) == folder
        carry_on(folder, 0)
        assert not (folder / "metrics.jsonl").exists() or not steps(folder)
        measured(folder, attempt + 1)
    assert [steps(folder, f"metrics.attempt-{number}.jsonl") for number in (0, 1)] == [[1], [2]]
    for stranger in ({}, {"TORCHELASTIC_RUN_ID": "8"}, {"TORCHELASTIC_RUN_ID": "none"}):
        with pytest.raises(UserError, match="already holds a run: choose another"):
            check_run_folder(str(folder), NONE, stranger)
    assert len(names(folder)) == 4


def test_a_folder_with_checkpoints_is_gone_on_with(tmp_path):
    measured(tmp_path, 1)
    saves = Checkpoint(enable=True)
    with pytest.raises(UserError, match="already holds a run, and no checkpoint to go on from: choose another"):
        check_run_folder(str(tmp_path), saves, {})
    (tmp_path / "checkpoint/step-1.tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint"):
        check_run_folder(str(tmp_path), saves, {})
    (tmp_path / "checkpoint/step-1").mkdir()
    check_run_folder(str(tmp_path), saves, {})
    for other in (NONE, Checkpoint(enable=True, resume="never")):
        with pytest.raises(UserError, match="already holds a run: choose another"):
            check_run_folder(str(tmp_path), other, {})


def test_a_run_that_torchrun_did_not_start_leaves_no_name(tmp_path):
    make_run_folder(str(tmp_path / "run"), "toy", {})
    assert names(tmp_path / "run") == []
    (tmp_path / "run/metrics.jsonl").touch()
    with pytest.raises(UserError, match="already holds a run"):
        check_run_folder(str(tmp_path / "run"), NONE, OURS)


def test_a_restart_must_be_able_to_tell_its_own_folder(tmp_path):
    nameless = OURS | {"TORCHELASTIC_RUN_ID": "none"}
    with pytest.raises(UserError, match="add --rdzv-id NAME to torchrun's options, or leave dump_folder out"):
        check_run_folder(str(tmp_path / "run"), NONE, nameless)
    check_run_folder(None, NONE, nameless)
    check_run_folder(str(tmp_path / "run"), NONE, nameless | {"TORCHELASTIC_MAX_RESTARTS": "0"})
