"""The ranks of a run: where they meet, and how long they wait."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.config.errors import UserError
from core.runtime.distributed import Comm, keep_traces_in, lower_timeout, process_group
from core.runtime.ranks import Ranks
from core.testing.ranks import run_ranks


def test_settings_that_make_no_sense_are_refused():
    timeouts = {"init_timeout_seconds": 0, "train_timeout_seconds": -1, "save_timeout_seconds": 0}
    assert list(dict(Comm(**timeouts, trace_buf_size=-1).problems())) == [*timeouts, "trace_buf_size"]
    assert not list(Comm().problems())


def test_a_process_alone_makes_no_group():
    with process_group(None, torch.device("cpu"), Comm()) as patience, Ranks.patient(patience).leader_first(0):
        assert not dist.is_initialized()
        lower_timeout(Comm())


def wait_in_vain(store: dist.Store, group: dist.ProcessGroup | None) -> str:
    """What becomes of a sum that one rank of two takes no part in."""
    if dist.get_rank() == 1:
        store.wait(["over"])
        return ""
    try:
        dist.all_reduce(torch.ones(1), group=group)
        return "no error"
    except RuntimeError as error:
        return str(error)
    finally:
        store.set("over", "")


def lowered(kind: str) -> str:
    before = dist.new_group([0, 1]) if kind == "a group made before" else None
    lower_timeout(Comm(train_timeout_seconds=1))
    store = dist.PrefixStore("test", dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    text = wait_in_vain(store, before)
    dist.destroy_process_group()
    return text


@pytest.mark.parametrize("kind", ["all ranks", "a group made before"])
def test_lower_timeout_holds_from_then_on(kind):
    assert "Timed out waiting 1000ms" in run_ranks(lowered, 2, kind)[0]


def prepare(folder: Path) -> str:
    """What a rank finds when its turn comes; the first takes longer than ranks wait otherwise, and then fails."""
    ranks = Ranks.patient(timedelta(seconds=60))
    lower_timeout(Comm(train_timeout_seconds=1))
    with ranks.leader_first(ranks.rank):
        found = ",".join(sorted(path.name for path in folder.iterdir()))
        if ranks.rank == 0:
            time.sleep(2)
        (folder / f"rank {ranks.rank}").touch()
    try:
        with ranks.leader_first(ranks.rank):
            raise UserError("no such text")
    except UserError as error:
        return f"{found}; {error}"


def test_the_first_rank_of_a_machine_prepares_and_the_others_find(tmp_path):
    assert run_ranks(prepare, 2, tmp_path) == ["; no such text", "rank 0; no such text"]


def test_traces_of_collectives_go_to_the_folder_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    for off in (None, "0"):
        if off:
            monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", off)
        keep_traces_in(tmp_path)
        assert not list(tmp_path.iterdir()) and "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    monkeypatch.chdir(tmp_path)
    keep_traces_in(Path("run"))
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/comm_traces/rank_"
    assert (tmp_path / "run/comm_traces").is_dir()
