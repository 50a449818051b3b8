"""How ranks learn why another one ended, whom they wait for, and that no wait is without end."""

import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from core.config.errors import LostRank, UserError
from core.runtime import activity, watch
from core.runtime.activity import MAIN, Doing, advance, begin, doings, waiting, working
from core.runtime.answers import Late, decoded, encoded
from core.runtime.board import Board
from core.runtime.launcher import World
from core.runtime.log import start_logging
from core.runtime.ranks import Ranks
from core.runtime.rendezvous import LAUNCHER, Address, Rendezvous, listen
from core.runtime.watch import watched, words
from core.testing.ranks import RankError, run_ranks

# What a process does


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What time it is for a process that has done nothing yet."""
    now = [100.0]
    monkeypatch.setattr(activity, "_phases", {})
    monkeypatch.setattr(activity, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_process_tells_its_phases(clock):
    assert doings() == {MAIN: Doing("the start of the run", False, 0, 0, "")}
    begin("step 3")
    with working("saving a checkpoint"):
        clock[0] += 5
        advance("3 GiB")
        clock[0] += 2
        assert doings() == {MAIN: Doing("saving a checkpoint", False, 7, 2, "3 GiB")}
        with waiting():
            assert doings() == {MAIN: Doing("saving a checkpoint", True, 0, 0)}
    assert doings() == {MAIN: Doing("step 3", False, 7, 0)}
    with pytest.raises(OSError), working("saving a checkpoint"):
        raise OSError
    with working("validation"):
        begin("step 4")
    assert doings() == {MAIN: Doing("step 4")}


def test_threads_have_phases_of_their_own_or_help_the_main_one(clock):
    seen = {}

    @working("saving")
    def save() -> None:
        seen.update(doings())

    begin("step 3")
    clock[0] += 5
    for work, name in ((save, "checkpoint"), (advance, "worker")):
        thread = threading.Thread(target=work, name=name)
        thread.start()
        thread.join()
    assert seen == {MAIN: Doing("step 3", False, 5, 5), "checkpoint": Doing("saving")}
    assert doings() == {MAIN: Doing("step 3", False, 5, 0)}


def test_a_doing_in_words():
    assert str(Doing("step 3", False, 61.2, 61.2)) == "step 3 for 61 s"
    busy = Doing("saving", False, 100, 20.4, "3.1 GiB written")
    assert str(busy) == "saving for 100 s, 3.1 GiB written, without progress for 20 s"


# Who is late


def test_who_does_not_wait_is_waited_for():
    waits, works = Doing("saving", True), Doing("saving", False, 5, 5)
    answers = {0: {MAIN: waits}, 1: {MAIN: works}, 2: {MAIN: works, "checkpoint": waits}, 4: {MAIN: waits}}
    late = Late.of(answers, 5)
    assert (
        late.ranks == "ranks 1-3" and str(late) == "rank 3: no answer; rank 1: saving for 5 s; rank 2: saving for 5 s"
    )
    behind = Late.of(answers, 5, "checkpoint")
    assert behind.ranks == "ranks 1, 3" and not Late.of({0: {MAIN: waits}}, 1)
    assert str(Late.of({0: {MAIN: works}}, 1)) == "saving for 5 s" and str(Late.of({}, 1)) == "no answer"
    told = {rank: {MAIN: works} for rank in range(1000)}
    assert str(Late.of(told, 1000)).endswith("; rank 2: saving for 5 s; and 997 more")
    assert Late.of(told, 1000).ranks == "ranks 0-999"
    assert decoded([{"rank": 3, "doings": encoded(answers[2])}]) == {3: answers[2]}


def test_messages_have_one_order():
    board, other = (Board(dist.PrefixStore("run", store)) for store in [dist.HashStore()] * 2)
    assert board.read(1) is None and [board.post(kind="a"), other.post(kind="b"), board.post(kind="b")] == [1, 2, 3]
    assert [(board.read(n) or {})["kind"] for n in (1, 2, 3)] == ["a", "b", "b"] and other.read(4) is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("too little"), "too little"),
        (OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
        (SystemExit(), "exit code 0"),
        (SystemExit(3), "exit code 3"),
        (KeyboardInterrupt(), "Ctrl-C"),
        (RuntimeError("\n".join("x" * 30)), "RuntimeError: x" + "\nx" * 9 + "\nand 20 more"),
    ],
)
def test_errors_are_told_in_few_words(error, text):
    assert words(error) == text


# Ranks


def stop_answering() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_elsewhere() -> None:
    with waiting():
        time.sleep(1000)


def work_slowly() -> None:
    with working("slow work"):
        for n in range(120):
            time.sleep(0.05)
            advance(f"part {n}")


def fail() -> None:
    raise UserError("the disk is full:\nbuy another")


TROUBLES = {
    "mistake": fail,
    "exit": sys.exit,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": stop_answering,
    "silence": lambda: time.sleep(1000),
    "deadlock": wait_elsewhere,
    "slow": work_slowly,
}


def live(trouble: str, troubled: int, port: int | None, timeout_s: float) -> str:
    """The life of a rank in which all wait for one another, and one comes to trouble; prints what it is told."""
    watch.LAUNCHER_PATIENCE_S, watch.GRACE_S, watch.ANSWER_S = 0.5, 1.0, 1.5
    world = World(dist.get_rank(), dist.get_world_size())
    master = Address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), LAUNCHER)
    place = Address("127.0.0.1", port, "rank 0") if port else master
    start_logging(aloud=world.rank == 0)
    ranks = Ranks.patient(timedelta(days=1))
    try:
        with watched(Rendezvous(world, place, 30), world, timeout_s):
            begin("this test")
            if world.rank == troubled:
                TROUBLES[trouble]()
            ranks.gather("")
        return "well"
    except LostRank as lost:
        print(f"told: {lost}", flush=True)
        time.sleep(1.0)  # the others want to hear it as well
        raise


@pytest.fixture
def told(monkeypatch):
    """A function: what each rank of three is told when one comes to trouble, by itself or by its watch."""
    monkeypatch.setattr("core.testing.ranks.EXIT_GRACE_S", 8.0)  # ranks end by themselves, however busy the machine

    def get(trouble: str, troubled: int = 1, *, port: int | None = None, timeout_s: float = 60.0) -> dict[int, str]:
        with pytest.raises(RankError) as error:
            run_ranks(live, 3, trouble, troubled, port, timeout_s)
        outputs = re.findall(r"--- output of rank (\d) ---\n(.*?)(?=\n\n--- output|\Z)", str(error.value), re.DOTALL)
        return {int(rank): re.sub(r"error \(rank \d of 3\)", "told", text) for rank, text in outputs}

    return get


GONE = "ended without a word: killed, out of memory, or its machine is gone"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("mistake", "rank 1 of 3 ended in this test: the disk is full:\nbuy another"),
        ("exit", "rank 1 of 3 ended in this test: exit code 0"),
        ("kill", f"rank 1 of 3 {GONE}"),
    ],
)
def test_why_a_rank_ended_is_known_to_all(told, trouble, reason):
    outputs = told(trouble)
    assert f"told: {reason}" in outputs[0] and f"told: {reason}" in outputs[2], outputs


def free_port() -> int:
    with listen(0) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("mistake", "rank 0 of 3 ended in this test: the disk is full"),
        ("kill", "rank 0 is gone: killed, out of memory, or its machine is"),
    ],
)
def test_rank_0_may_keep_the_store_and_fail(told, trouble, reason):
    outputs = told(trouble, 0, port=free_port())
    assert f"told: {reason}" in outputs[1] and f"told: {reason}" in outputs[2], outputs


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (
            "silence",
            r"rank 1 of 3 made no progress for \d+ s \(this test for \d+ s; comm.save_timeout_seconds is 4.5\)",
        ),
        ("stop", r"rank 1 of 3 made no progress for \d+ s \(no answer; comm.save_timeout_seconds is 4.5\)"),
        ("deadlock", r"all 3 ranks have waited for one another for \d+ s \(comm.save_timeout_seconds is 4.5\)"),
    ],
)
def test_no_wait_is_without_end(told, trouble, reason):
    outputs = told(trouble, timeout_s=4.5)
    for rank in {0, 1, 2} - ({1} if trouble == "stop" else set()):
        assert re.search(rf"told: {reason}", outputs[rank]), outputs
    if trouble != "deadlock":
        assert re.search(
            r"^warning: waiting for rank 1 since \d+ s \((this test for \d+ s|no answer)\)$", outputs[0], re.M
        )


def live_and_hear(timeout_s: float) -> tuple[str, list[str]]:
    """As `live`, with what this rank tells of whom it waits for."""
    heard: list[str] = []
    watch.warn_everywhere = lambda text, rank: heard.append(text)
    return live("slow", 1, None, timeout_s), heard


def test_work_that_goes_on_is_waited_for_and_told():
    (first, heard), (second, nothing) = run_ranks(live_and_hear, 2, 3.0)
    assert (first, second, nothing) == ("well", "well", [])
    pattern = r"waiting for rank 1 since \d+ s \(slow work for \d+ s, part \d+(, without progress for \d+ s)?\)"
    assert heard and all(re.fullmatch(pattern, line) for line in heard)
