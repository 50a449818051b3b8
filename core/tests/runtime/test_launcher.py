"""What launchers say of a rank, and where the ranks meet."""

import os
import random

import pytest

from core.config.errors import UserError
from core.runtime.launcher import PORTS, World, find_world, launch_id, meeting_point

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
        (TORCHRUN | {"WORLD_SIZE": "\u0668"}, "not numbers of ranks"),
        (TORCHRUN | {"WORLD_SIZE": "1" * 5_000}, "not numbers of ranks"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "x"}, "^LOCAL_WORLD_SIZE=x is not a number of ranks: unset it, or start with"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "-1"}, "^LOCAL_WORLD_SIZE=-1 is not a number of ranks"),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "1"},
            "LOCAL_WORLD_SIZE=1, LOCAL_RANK=1, WORLD_SIZE=8: the ranks of th",
        ),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9, .* at most WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_PROCID, SLURM_STEP_NUM_TASKS set without SLURM_LO"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "0"}, "SLURM_STEP_NUM_NODES=0: 5 tasks run on 1 to 5 machines"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "two"}, "SLURM_STEP_NUM_NODES=two is not a number of machines"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS=, .* not numbers of ranks"),
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
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({"SLURM_JOB_ID": "abc"}, "^SLURM_JOB_ID=abc is not a number of SLURM"),
        ({"SLURM_STEP_ID": "-3"}, "^SLURM_STEP_ID=-3 is not a number of SLURM"),
        (
            {"SLURM_JOB_ID": None, "MASTER_ADDR": "", "MASTER_PORT": "29501"},
            "^MASTER_ADDR is empty: set it",
        ),
    ],
)
def test_no_place_to_meet_is_refused(scontrol, change, message):
    environ = {name: value for name, value in (SRUN | {"PATH": scontrol} | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        meeting_point(environ)


def test_attempts_of_one_torchrun_have_a_name_in_common():
    assert launch_id({"TORCHELASTIC_RUN_ID": "7"}) == "7"
    assert launch_id({}) is launch_id({"TORCHELASTIC_RUN_ID": "none"}) is None


WORDS = ["", "0", "1", "2", "7", "-1", "x", "1.5", " 1", "1e3", "\u0663", "4294967295", "9" * 400, "none", "n[1-2]"]


def test_whatever_the_variables_hold_a_launcher_gets_one_line():
    draw = random.Random(0)
    names = sorted({*TORCHRUN, *SRUN, "MASTER_ADDR", "MASTER_PORT"})
    refused = 0
    for _ in range(3_000):
        start = draw.choice([{}, TORCHRUN, SRUN])
        environ = start | {name: draw.choice(WORDS) for name in draw.sample(names, draw.randint(1, 4))}
        try:
            world = find_world(environ)
            assert world is None or 0 <= world.local_rank < world.local_size <= world.size > world.rank >= 0
            assert meeting_point(environ | {"PATH": ""})[1] in range(1, 2**16)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 1_000
