"""Runs of several ranks as launchers start them: equal to one process, and how they end when something goes wrong."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
import troubled_run as program
from rank_life import live, torchrun_environ
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from troubled_run import troubled_run

from core.config.cli import main
from core.testing.ranks import PRELOAD

HERE = Path(__file__).parent
GRACE_S = 2.0  # between a launcher's SIGTERM and its SIGKILL
LIMIT_S = 60.0


@dataclass
class Ended:
    """How the ranks of a launch ended, and what each printed."""

    codes: list[int | None]
    texts: list[str]


def become_rank(words: list[str], environ: dict[str, str], output: Path) -> None:
    """The life of a rank of the program, which says where it tokenises."""
    sys.path.insert(0, str(HERE))
    program.say_who_tokenises()
    live(program, words, environ, output)


def launch(
    file: Path, *words: str, attended: bool = True, ranks: tuple[int, ...] = (0, 1), environs: list[dict] | None = None
) -> Ended:
    """Start two ranks, or some of them, of a run; if `attended` the first failure ends all, as a launcher does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = None
    if environs is None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environs = [torchrun_environ(rank, 2, store.port) for rank in (0, 1)]
    outputs = [file.with_suffix(f".rank-{rank}.txt") for rank in ranks]
    processes = [
        context.Process(target=become_rank, args=(["--config", str(file), *words], environs[rank], output))
        for rank, output in zip(ranks, outputs, strict=True)
    ]
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        for process in processes:
            process.start()
    deadline, told = time.monotonic() + LIMIT_S, False
    while running := [process for process in processes if process.is_alive()]:
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        connection.wait([process.sentinel for process in running], 0.1)
        if attended and not told and any(process.exitcode for process in processes):
            told, deadline = True, time.monotonic() + GRACE_S
            for process in running:
                process.terminate()
    return Ended([process.exitcode for process in processes], [output.read_text() for output in outputs])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def records(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def numbers(folder: Path) -> list[list[float]]:
    """Step, loss and gradient norm of every record, and the validation loss where there is one."""
    names = ("step", "loss", "grad_norm", "validation_loss")
    return [[r[name] for name in names if r[name] is not None] for r in records(folder)]


def same(folder: Path, expected: list[list[float]]) -> bool:
    """Whether a run's numbers are those expected, to the rounding of sums in another order."""
    found = numbers(folder)
    assert [len(row) for row in expected] == [3, 3, 4, 3, 3, 4]
    return len(found) == 6 and all(a == pytest.approx(b, rel=1e-5) for a, b in zip(found, expected, strict=True))


def of_layers(record: dict) -> dict[str, float]:
    """The numbers of single layers in a record."""
    return {name: value for name, value in record.items() if "_norm/" in name or "_rms/" in name or "_logit/" in name}


@pytest.fixture(scope="module")
def alone_folder(tmp_path_factory) -> Path:
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    with contextlib.redirect_stdout(io.StringIO()):
        main(program, ["--config", str(troubled_run(folder, "run")), "--metrics.per_layer_freq", "3"])
    return folder / "run"


@pytest.fixture(scope="module")
def alone(alone_folder) -> list[list[float]]:
    """The numbers of the run in one process."""
    return numbers(alone_folder)


@pytest.fixture(scope="module")
def alone_layers(alone_folder) -> list[dict[str, float]]:
    """Those of its layers."""
    return [of_layers(record) for record in records(alone_folder)]


@pytest.mark.parametrize("tensor", [1, 2], ids=["FSDP 2", "TP 2"])
def test_two_ranks_train_as_one_and_speak_once(tmp_path, alone, alone_layers, tensor):
    options = ["--parallelism.tensor_parallel_degree", str(tensor), "--debug.log_every_rank"]
    options += ["--metrics.per_layer_freq", "3", "--metrics.enable_tensorboard", "--metrics.save_for_all_ranks"]
    ended = launch(troubled_run(tmp_path, "run"), *options)
    assert ended.codes == [0, 0], ended.texts
    folder = tmp_path / "run"
    assert same(folder, alone)
    measured = [of_layers(record) for record in records(folder)]
    assert [bool(each) for each in measured] == [False, False, True] * 2
    for each, expected in zip(measured, alone_layers, strict=True):
        assert each == pytest.approx(expected, rel=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "config.json",
        "events.jsonl",
        "logs",
        "metrics.jsonl",
        "tb",
        "torchrun-id",
    ]
    for rank in (0, 1):
        events = EventAccumulator(str(folder / "tb" / f"rank-{rank}")).Reload()
        assert [each.step for each in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
        assert [each.value for each in events.Scalars("train/loss")] == pytest.approx(
            [row[1] for row in alone], rel=1e-5
        )
        assert all(each.value > 0 for each in events.Scalars("speed/memory_gib"))
    assert ended.texts[1] == "" and ended.texts[0].count("tokenises here") == 1
    assert "2 (tensor 2)" in ended.texts[0] if tensor == 2 else "2 (shard 2)" in ended.texts[0]
    logs = [(folder / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    for log in [ended.texts[0], *logs]:
        assert log.count("finished 6 steps") == 1 and len(re.findall(r"step \d/6", log)) == 6


def test_srun_starts_the_same_run(tmp_path, alone):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames here[1-2]" ] && printf "127.0.0.1\\nhere2\\n"\n')
    scontrol.chmod(0o755)
    nodes = {"SLURM_STEP_NODELIST": "here[1-2]", "PATH": f"{scontrol.parent}:{os.environ['PATH']}", "MASTER_ADDR": ""}
    port = free_port()
    ended = launch(troubled_run(tmp_path, "run"), environs=[srun(rank, port) | nodes for rank in (0, 1)])
    assert ended.codes == [0, 0] and same(tmp_path / "run", alone)
    assert ended.texts[1] == "" and "torchrun-id" not in os.listdir(tmp_path / "run")


def test_a_mistake_of_all_ranks_is_told_once_before_they_meet(tmp_path):
    wrong = ["--parallelism.tensor_parallel_degree", "3"]
    ended = launch(troubled_run(tmp_path, "run"), *wrong, ranks=(1,))
    assert ended.codes == [2] and "error (rank 1 of 2): parallelism" in ended.texts[0]
    ended = launch(troubled_run(tmp_path, "run"), *wrong)
    assert ended.codes[0] == 2 and ended.codes[1] in (-15, 2)
    assert re.match(r"error \(rank 0 of 2\): parallelism\.\w+: tensor_parallel_degree 3 makes 3 ranks", ended.texts[0])
    assert "Traceback" not in ended.texts[0] + ended.texts[1] and not (tmp_path / "run").exists()
    repeated = ended.texts[0].replace("rank 0", "rank 1")
    assert ended.texts[1] in ("", repeated) and (ended.codes[1] == -15 or ended.texts[1])


def test_text_that_is_missing_is_told_once_after_they_met(tmp_path):
    ended = launch(troubled_run(tmp_path, "run"), "--dataloader.dataset", str(tmp_path / "nothing"), attended=False)
    assert ended.codes == [2, 2]
    for rank, text in enumerate(ended.texts):
        assert text.startswith(f"error (rank {rank} of 2): there is no ") and text.count("\n") == 1


def plain(rank: int, port: int) -> dict[str, str]:
    """What somebody sets who starts each rank by hand: nobody keeps a store for them."""
    return {**torchrun_environ(rank, 2, port), "TORCHELASTIC_USE_AGENT_STORE": ""}


def srun(rank: int, port: int) -> dict[str, str]:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"}
    return {**step, "MASTER_PORT": str(port), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


LAUNCHERS = {"torchrun": None, "plain": plain, "srun": srun}
WORDLESS = "ended without a word: killed, out of memory, or its machine is gone"


@pytest.mark.parametrize(
    ("launcher", "trouble", "rank", "code", "words"),
    [
        ("torchrun", "SIGKILL", 1, -9, f"rank 1 of 2 {WORDLESS}"),
        ("torchrun", "raise", 1, 1, "rank 1 of 2 ended in step 2: RuntimeError: the disk is on fire"),
        ("torchrun", "mistake", 1, 2, "rank 1 of 2 ended in step 2: the disk is full: buy another"),
        ("plain", "exit", 1, 0, "rank 1 of 2 ended in step 2: exit code 0"),
        ("plain", "mistake", 0, 2, "rank 0 of 2 ended in step 2: the disk is full: buy another"),
        ("plain", "SIGKILL", 0, -9, "rank 0 is gone: killed, out of memory, or its machine is"),
        ("srun", "raise", 1, 1, "rank 1 of 2 ended in step 2: RuntimeError: the disk is on fire"),
    ],
)
def test_a_rank_that_fails_ends_the_others_which_say_so(tmp_path, launcher, trouble, rank, code, words):
    port, environ = free_port(), LAUNCHERS[launcher]
    environs = [environ(rank, port) for rank in (0, 1)] if environ else None
    file = troubled_run(tmp_path, "run", trouble=trouble, trouble_rank=rank)
    ended = launch(file, attended=False, environs=environs)
    other = 1 - rank
    assert (ended.codes[rank], ended.codes[other]) == (code, 1), ended.texts
    assert (
        ended.texts[other].endswith(f"error (rank {other} of 2): {words}\n") and "Traceback" not in ended.texts[other]
    )
    assert {"raise": "RuntimeError: the disk is on fire", "mistake": "the disk is full"}.get(
        trouble, ""
    ) in ended.texts[rank]
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(("step", "waited"), [(3, 3), (1, 6)], ids=["later", "in the first step"])
def test_a_rank_that_hangs_ends_the_others_within_the_timeout(tmp_path, step, waited):
    timeouts = ["--comm.train_timeout_seconds", "3"] + ["--comm.init_timeout_seconds", "6"] * (step == 1)
    ended = launch(troubled_run(tmp_path, "run", trouble="hang", trouble_step=step), *timeouts, attended=False)
    assert ended.codes == [1, 1], ended.texts
    phase = f"step {step - 1}" if step > 1 else "the start of the run"
    reason = (
        rf"rank 1 of 2 did not come to what others waited for \({phase} for \d+ s\): Timed out waiting {waited}000ms"
    )
    assert re.search(rf"error \(rank 0 of 2\): {reason}", ended.texts[0]), ended.texts
    assert re.search(rf"error \(rank 1 of 2\): {reason}", ended.texts[1]) and "Traceback" not in str(ended.texts)


def test_a_rank_that_never_comes_ends_the_others_within_the_timeout(tmp_path):
    ended = launch(troubled_run(tmp_path, "run"), "--comm.init_timeout_seconds", "2", ranks=(0,))
    assert (
        ended.codes == [2] and "error (rank 0 of 2): rank 1 of 2 did not come within 2 s (comm.init" in ended.texts[0]
    )


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    ended = launch(troubled_run(tmp_path, "run", trouble="SIGTERM"), "--debug.log_every_rank")
    folder = tmp_path / "run"
    assert ended.codes == [0, 0] and [r["step"] for r in records(folder)] == [1, 2, 3]
    logs = [(folder / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    for text, cause in zip(logs, ["a signal to another rank", "SIGTERM"], strict=True):
        assert f"stopped by {cause} after step 3 of 6\n" in text
    assert f"kept in {folder}:\n" in logs[0]


def test_each_rank_writes_traces_of_its_own(tmp_path):
    options = ["--profiling.enable_profiling", "--profiling.profile_freq", "2", "--profiling.profiler_warmup", "1"]
    ended = launch(troubled_run(tmp_path, "run"), "--training.steps", "2", *options)
    assert ended.codes == [0, 0], ended.texts
    traces = sorted((tmp_path / "run/profile_traces").glob("*.json"))
    assert [trace.name for trace in traces] == ["step-2-rank-0.json", "step-2-rank-1.json"]
    for trace in traces:
        assert "aten::mm" in {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}


def test_another_attempt_shares_store_and_folder_with_the_one_before(tmp_path, alone):
    file = troubled_run(tmp_path, "run", trouble="SIGKILL")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environs = [torchrun_environ(rank, 2, store.port) for rank in (0, 1)]
    assert -9 in launch(file, environs=environs).codes
    ended = launch(file, environs=environs)
    assert ended.codes == [0, 0], ended.texts
    assert same(tmp_path / "run", alone)
    first = records(tmp_path / "run", "metrics.attempt-0.jsonl")
    assert [r["loss"] for r in first] == pytest.approx([row[1] for row in alone[:2]], rel=1e-5)
    stranger = [{**environ, "TORCHELASTIC_RUN_ID": "another"} for environ in environs]
    ended = launch(file, environs=stranger)
    assert ended.codes[0] == 2 and "already holds a run" in ended.texts[0]


def torchrun(file: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(HERE / "troubled_run.py")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--config", str(file), "--trust", "troubled_run"],
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def last_words(agent: subprocess.Popen) -> str:
    """All that an agent and its ranks print until they end."""
    try:
        return agent.communicate(timeout=3 * LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        agent.terminate()
        raise


@pytest.mark.slow
@pytest.mark.faults  # test_faults has torchrun go on from a checkpoint
def test_torchrun_starts_again_after_a_rank_was_killed(tmp_path, alone):
    file = troubled_run(tmp_path, "run", trouble="SIGKILL")
    agent = torchrun(file, "--nproc-per-node", "2", "--max-restarts", "2")
    text = last_words(agent)
    assert agent.returncode == 0, text
    assert same(tmp_path / "run", alone) and len(records(tmp_path / "run", "metrics.attempt-0.jsonl")) == 2


@pytest.mark.slow
def test_torchrun_closes_with_the_words_of_the_rank_that_failed(tmp_path):
    agent = torchrun(troubled_run(tmp_path, "run", trouble="mistake"), "--nproc-per-node", "2")
    cause = last_words(agent).partition("Root Cause (first observed failure)")[2]
    assert agent.returncode == 1
    assert re.search(r"exitcode  : (2|-15) ", cause)  # -15 where its end takes longer than torchrun's patience
    assert "error (rank 1 of 2): the disk is full: buy another" in cause


@pytest.mark.slow
def test_two_machines_train_as_one(tmp_path, alone):
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two machines"]
    file = troubled_run(tmp_path, "run")
    agents = [torchrun(file, "--nnodes", "2", "--nproc-per-node", "1", *meeting) for _ in range(2)]
    texts = [last_words(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    assert same(tmp_path / "run", alone) and sum("finished 6 steps" in text for text in texts) == 1
