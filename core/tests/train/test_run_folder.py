"""The folder of a run that torchrun starts several times."""

import pytest

from core.config.errors import UserError
from core.train.folder import check_run_folder, make_run_folder

OURS = {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_MAX_RESTARTS": "2"}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_attempt_goes_on_in_the_folder_and_keeps_what_was_measured(tmp_path):
    folder = tmp_path / "run"
    for attempt in range(3):
        check_run_folder(str(folder), OURS)
        assert make_run_folder(str(folder), "toy", OURS) == folder and not (folder / "metrics.jsonl").exists()
        (folder / "metrics.jsonl").write_text(f"attempt {attempt}")
    kept = [(folder / f"metrics.attempt-{number}.jsonl").read_text() for number in (0, 1)]
    assert kept == ["attempt 0", "attempt 1"]
    for stranger in ({}, {"TORCHELASTIC_RUN_ID": "8"}, {"TORCHELASTIC_RUN_ID": "none"}):
        with pytest.raises(UserError, match="already holds a run: choose another"):
            check_run_folder(str(folder), stranger)
    assert len(names(folder)) == 4


def test_a_run_that_torchrun_did_not_start_leaves_no_name(tmp_path):
    make_run_folder(str(tmp_path / "run"), "toy", {})
    assert names(tmp_path / "run") == []
    (tmp_path / "run/metrics.jsonl").touch()
    with pytest.raises(UserError, match="already holds a run"):
        check_run_folder(str(tmp_path / "run"), OURS)


def test_a_restart_must_be_able_to_tell_its_own_folder(tmp_path):
    nameless = OURS | {"TORCHELASTIC_RUN_ID": "none"}
    with pytest.raises(UserError, match="add --rdzv-id NAME to torchrun's options, or leave dump_folder out"):
        check_run_folder(str(tmp_path / "run"), nameless)
    check_run_folder(None, nameless)
    check_run_folder(str(tmp_path / "run"), nameless | {"TORCHELASTIC_MAX_RESTARTS": "0"})
