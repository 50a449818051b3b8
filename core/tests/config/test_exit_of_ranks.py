"""How a rank ends: who of many speaks, when, and what torchrun is told."""

import json
import os
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from core.config import exit
from core.config.errors import LostRank, UserError
from core.config.exit import LAUNCHER_PATIENCE_S, exit_plainly

LAUNCHERS = {
    "torchrun": {"RANK": "{}", "WORLD_SIZE": "4", "LOCAL_RANK": "{}"},
    "srun": {"SLURM_PROCID": "{}", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "{}"},
    "torchrun below srun": {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "RANK": "{}",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "{}",
    },
}


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """How long the process waited before it spoke; nobody launched it."""
    for variables in LAUNCHERS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    naps: list[float] = []
    monkeypatch.setattr(exit.time, "sleep", naps.append)
    return naps


def become(monkeypatch, launcher: str, rank: int, local: int) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value.format(local if "LOCAL" in name else rank))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("rank", "local"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_the_first_rank_of_a_machine_tells_a_mistake_at_once(monkeypatch, capsys, naps, launcher, rank, local):
    become(monkeypatch, launcher, rank, local)
    with pytest.raises(SystemExit) as end, exit_plainly():
        raise UserError("too little:\nmore is better")
    assert end.value.code == 2 and naps == [LAUNCHER_PATIENCE_S] * (local > 0)
    assert capsys.readouterr().err == f"error (rank {rank} of 4): too little:\n       more is better\n"


@pytest.mark.parametrize("local", [0, 1])
def test_ctrl_c_is_told_by_the_first_rank_of_a_machine(monkeypatch, capsys, naps, local):
    become(monkeypatch, "torchrun", 1, local)
    with pytest.raises(SystemExit) as end, exit_plainly():
        raise KeyboardInterrupt
    assert (end.value.code, naps, capsys.readouterr().err) == (130, [], "interrupted\n" * (local == 0))


def test_a_rank_that_another_one_ended_lets_that_one_speak_first(monkeypatch, capsys, naps):
    become(monkeypatch, "torchrun", 0, 0)
    with pytest.raises(SystemExit) as end, exit_plainly():
        raise LostRank("rank 1 of 4 ended in step 3: too little") from RuntimeError("Connection closed by peer")
    (nap,) = naps
    assert end.value.code == 1 and nap > LAUNCHER_PATIENCE_S
    assert capsys.readouterr().err == "error (rank 0 of 4): rank 1 of 4 ended in step 3: too little\n"


def test_a_defect_keeps_its_traceback(monkeypatch, capsys, naps):
    become(monkeypatch, "torchrun", 0, 0)
    with pytest.raises(RuntimeError, match="no disk"), exit_plainly():
        raise RuntimeError("no disk")
    assert naps == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [UserError("too little"), RuntimeError("no disk")])
def test_torchrun_finds_the_words_of_a_rank_where_it_looks(monkeypatch, tmp_path, capsys, naps, error):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises((SystemExit, RuntimeError)), exit_plainly():
        raise error
    failure = ProcessFailure(local_rank=0, pid=os.getpid(), exitcode=2, error_file=str(file))
    details = failure.message["extraInfo"]
    assert str(error) in details["py_callstack"] and failure.timestamp == int(details["timestamp"]) > 1.7e9
    assert ("Traceback" in details["py_callstack"]) == isinstance(error, RuntimeError)
    assert json.loads(file.read_text())["message"]["message"] == details["py_callstack"]


def test_torchrun_is_told_when_a_mistake_was_made(monkeypatch, tmp_path, capsys, naps):
    """Ranks that it ended speak later, and it may be gone before it has printed its words."""
    become(monkeypatch, "torchrun", 1, 1)
    file, found = tmp_path / "error.json", []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(exit.time, "sleep", lambda seconds: found.append(json.loads(file.read_text())))
    with pytest.raises(SystemExit), exit_plainly():
        raise UserError("too little")
    assert [each["message"]["message"] for each in found] == ["error (rank 1 of 4): too little"]


def test_nothing_is_left_where_nobody_looks(monkeypatch, tmp_path, capsys, naps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    with pytest.raises(SystemExit), exit_plainly():
        raise UserError("too little")
    assert not list(tmp_path.iterdir()) and naps == []
    with exit_plainly():
        print("all is well", file=sys.stderr)
