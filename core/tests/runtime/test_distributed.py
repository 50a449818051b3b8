"""The ranks of a run: where they meet, and how long they wait."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.config.errors import UserError
from core.runtime.distributed import Comm, keep_traces_in, leader_first, lower_timeout, process_group, unused_part
from core.runtime.launcher import World
from core.testing.ranks import run_ranks


def test_settings_that_make_no_sense_are_refused():
    problems = dict(Comm(init_timeout_seconds=0, train_timeout_seconds=-1, trace_buf_size=-1).problems())
    assert list(problems) == ["init_timeout_seconds", "train_timeout_seconds", "trace_buf_size"]
    assert not list(Comm().problems())


def test_a_process_alone_makes_no_group():
    with process_group(None, torch.device("cpu"), Comm()), leader_first(World()):
        assert not dist.is_initialized()
        lower_timeout(Comm())


def attempt(store: dist.Store, size: int) -> list[dist.Store]:
    """The parts that the ranks of one attempt agree on, the first coming last."""
    with ThreadPoolExecutor(size) as pool:
        worlds = [World(rank, size) for rank in reversed(range(size))]
        futures = [pool.submit(unused_part, store, world, timedelta(seconds=30)) for world in worlds[:-1]]
        time.sleep(0.1)
        futures.append(pool.submit(unused_part, store, worlds[-1], timedelta(seconds=30)))
        return [future.result() for future in futures]


def test_every_attempt_gets_a_part_of_the_store_that_is_empty():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    store.set("asks 1", "a rank that is dead")
    for number in range(3):
        parts = attempt(store, 3)
        assert not parts[0].check(["address"])
        parts[0].set("address", f"of attempt {number}")
        assert [part.get("address") for part in parts] == [f"of attempt {number}".encode()] * 3


def test_ranks_that_do_not_come_are_not_waited_for():
    with pytest.raises(TimeoutError, match="1 of 3 ranks came within 0 s"):
        unused_part(dist.HashStore(), World(0, 3), timedelta(seconds=0.1))


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
    lower_timeout(Comm(train_timeout_seconds=1))
    rank = dist.get_rank()
    with leader_first(World(rank, 2, rank, 2)):
        found = ",".join(sorted(path.name for path in folder.iterdir()))
        if rank == 0:
            time.sleep(2)
        (folder / f"rank {rank}").touch()
    try:
        with leader_first(World(rank, 2, rank, 2)):
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
