"""The ranks of a run: what launchers say of them, where they meet, and how long they wait."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.config.errors import UserError
from core.runtime.distributed import (
    PORTS,
    Comm,
    World,
    find_world,
    keep_traces_in,
    launch_id,
    leader_first,
    lower_timeout,
    meeting_point,
    process_group,
    unused_part,
)
from core.testing.ranks import run_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
JOB = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"}
FIRST_TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = JOB | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
}
SHELLS = {
    "no launcher": {},
    "salloc": JOB,
    "salloc with a step for the shell": JOB | FIRST_TASK | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "sbatch": JOB | FIRST_TASK,
    "srun of one task": JOB | FIRST_TASK | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
}


@pytest.mark.parametrize("environ", SHELLS.values(), ids=SHELLS)
def test_a_process_that_nobody_launched_is_alone(environ):
    assert find_world(environ) is None


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        (TORCHRUN, World(5, 8, 1, 4)),
        (SRUN, World(4, 5, 1, 3)),
        (SRUN | TORCHRUN, World(5, 8, 1, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World(0, 1, 0, 1)),
    ],
    ids=["torchrun", "srun", "torchrun below srun", "one rank"],
)
def test_launchers_say_who_a_rank_is(environ, world):
    assert find_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE set without RANK, LOCAL_RANK: start with .* or unset WORLD_SIZE"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8, LOCAL_RANK=1: ranks count from 0"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1, .* not numbers of ranks"),
        (TORCHRUN | {"LOCAL_RANK": "6"}, "LOCAL_RANK=6: .* no rank's number on its machine is above"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE=many, .* not numbers of ranks"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_PROCID, SLURM_STEP_NUM_TASKS set without SLURM_LO"),
    ],
)
def test_variables_that_make_no_sense_are_refused(environ, message):
    with pytest.raises(UserError, match=message):
        find_world(environ)


@pytest.fixture
def scontrol(tmp_path) -> str:
    """The PATH of a machine whose scontrol knows the nodes of one list."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_ranks_meet_where_the_launcher_says(scontrol):
    master = {"MASTER_ADDR": "host", "MASTER_PORT": "29501"}
    assert meeting_point(TORCHRUN | master) == ("host", 29501)
    srun = SRUN | {"PATH": scontrol}
    address, port = meeting_point(srun)
    assert address == "n1" and port in PORTS
    others = [meeting_point(srun | {name: "32"})[1] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    assert len({port, *others}) == 3 and all(other in PORTS for other in others)
    assert meeting_point(srun | {"SLURM_JOB_ID": "4294967295"})[1] in PORTS
    assert meeting_point(srun | {"MASTER_PORT": "29501"}) == ("n1", 29501)
    assert meeting_point(SRUN | {"MASTER_ADDR": "n2", "PATH": ""}) == ("n2", port)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_JOB_ID": None}, "MASTER_ADDR and MASTER_PORT not set: start with torchrun, or with srun"),
        ({"SLURM_JOB_ID": None, "MASTER_ADDR": "n1"}, "^MASTER_PORT not set"),
        ({"SLURM_STEP_NODELIST": "m7"}, 'scontrol cannot tell the first node of "m7": set MASTER_ADDR'),
        ({"PATH": "/nowhere"}, "scontrol cannot tell the first node of"),
        ({"MASTER_PORT": "none"}, "MASTER_PORT=none is no port"),
    ],
)
def test_no_place_to_meet_is_refused(scontrol, change, message):
    environ = {name: value for name, value in (SRUN | {"PATH": scontrol} | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        meeting_point(environ)


def test_attempts_of_one_torchrun_have_a_name_in_common():
    assert launch_id({"TORCHELASTIC_RUN_ID": "7"}) == "7"
    assert launch_id({}) is launch_id({"TORCHELASTIC_RUN_ID": "none"}) is None


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
