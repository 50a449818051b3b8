"""Ranks for tests: what they give back, how they fail, and that nothing is left of them."""

import os
import signal
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.testing.ranks import RankError, run_ranks

FOREVER_S = 10_000
ENDED = "had not answered and was ended"


def place(word: str) -> dict[str, Any]:
    """Where a rank finds itself."""
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    environ = [os.environ[name] for name in names]
    return {"word": word, "rank": dist.get_rank(), "environ": environ, "backend": dist.get_backend()}


def processes() -> dict[str, int]:
    tasks = Path(f"/proc/{os.getppid()}/task")
    server = len(list(tasks.iterdir())) if tasks.exists() else 1
    port = int(os.environ["MASTER_PORT"])
    return {"pid": os.getpid(), "port": port, "threads": torch.get_num_threads(), "server_threads": server}


def sum_of_ranks() -> torch.Tensor:
    total = torch.full((3,), float(dist.get_rank()))
    dist.all_reduce(total)
    return total


def own_group() -> torch.Tensor:
    sum_of_ranks()
    dist.destroy_process_group()
    time.sleep(0.5 * int(os.environ["RANK"]))  # an early rank would find the late one's first address, were it there
    dist.init_process_group("gloo")
    return sum_of_ranks()


def leave_a_trace(folder: Path) -> None:
    """What `nothing_is_left` looks at."""
    (folder / os.environ["RANK"]).write_text(f"{os.getpid()} {os.environ['MASTER_PORT']}")


def fail_alone(folder: Path, failing: int) -> None:
    """One rank fails, the others wait for it."""
    leave_a_trace(folder)
    if dist.get_rank() == failing:
        print("a last word")
        raise ValueError("no such token")
    sum_of_ranks()


def fail_one_after_the_other() -> None:
    time.sleep(0.5 * (2 - dist.get_rank()))
    raise ValueError(f"rank {dist.get_rank()} fails")


def sleep_for_good() -> None:
    time.sleep(FOREVER_S)


def fail_beside_a_sleeper_and_a_stopped_rank() -> None:
    """The stopped rank is one that only SIGKILL ends."""
    sum_of_ranks()  # until all ranks are connected, a failure of one fails the others
    if dist.get_rank() == 0:
        sleep_for_good()
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    raise ValueError("awake")


def hang(folder: Path) -> None:
    """One rank never comes to where the others wait for it."""
    leave_a_trace(folder)
    if dist.get_rank() == 1:
        sleep_for_good()
    sum_of_ranks()


def kill_itself(folder: Path) -> None:
    leave_a_trace(folder)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_of_ranks()


def exit_with(code: int) -> None:
    if dist.get_rank() == 0:
        os._exit(code)
    sum_of_ranks()


def give_a_function() -> object:
    return lambda: 0


def warn() -> str:
    warnings.warn("old habit", UserWarning, stacklevel=1)
    return "warned"


def talk() -> None:
    print("to stdout")
    os.write(2, b"to stderr\n")


def read_environ(name: str) -> str | None:
    return os.environ.get(name)


def value_of(module: str) -> int:
    return __import__(module).VALUE


def nothing_is_left(traces: Path, temporary: Path) -> None:
    """No process, no open port and no file of the ranks that left their traces."""
    assert list(temporary.iterdir()) == []
    found = [trace.read_text().split() for trace in sorted(traces.iterdir())]
    assert len(found) >= 2
    for pid, port in found:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    return folder


def test_results_come_in_order_of_rank() -> None:
    for rank, found in enumerate(run_ranks(place, 3, "hello")):
        environ = [str(rank), str(rank), "3", "3", "127.0.0.1"]
        assert found == {"word": "hello", "rank": rank, "environ": environ, "backend": "gloo"}


def test_ranks_reduce_together_and_give_tensors_back() -> None:
    results = run_ranks(sum_of_ranks, 4)
    assert len(results) == 4
    for total in results:
        torch.testing.assert_close(total, torch.tensor([6.0, 6.0, 6.0]))


def test_a_rank_is_a_process_of_one_thread_forked_from_one_server_of_one_thread() -> None:
    found = run_ranks(processes, 2) + run_ranks(processes, 2)
    assert len({rank["pid"] for rank in found} | {os.getpid()}) == 5
    assert {rank["threads"] for rank in found} == {1}
    assert {rank["server_threads"] for rank in found} == {1}


def test_a_function_may_make_its_own_process_group_as_under_torchrun() -> None:
    for total in run_ranks(own_group, 2):
        torch.testing.assert_close(total, torch.tensor([1.0, 1.0, 1.0]))


def test_ranks_have_the_callers_environment_and_module_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMATURE_WORD", "here")
    assert run_ranks(read_environ, 1, "ARMATURE_WORD") == ["here"]
    monkeypatch.delenv("PATH")
    assert run_ranks(read_environ, 1, "PATH") == [None]
    (tmp_path / "found_by_ranks.py").write_text("VALUE = 7")
    monkeypatch.syspath_prepend(tmp_path)
    assert run_ranks(value_of, 1, "found_by_ranks") == [7]


def test_output_is_shown_on_failure_only(traces: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(talk, 2)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RankError, match=r"--- output of rank 1 ---\na last word"):
        run_ranks(fail_alone, 2, traces, 1)
    assert capfd.readouterr() == ("", "")


def test_the_failing_rank_is_shown_and_the_others_do_not_wait_for_it(traces: Path, temporary: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(fail_alone, 3, traces, 1)
    assert time.monotonic() - begin < 30  # half the limit; it takes less than one
    first, *rest = str(caught.value).split("\n\n")
    assert caught.value.rank == 1
    assert first.startswith("rank 1 of 3: Traceback")
    assert 'raise ValueError("no such token")' in first and first.endswith("ValueError: no such token")
    assert sorted(part[:11] for part in rest[:2]) == ["then rank 0", "then rank 2"]
    assert ENDED not in str(caught.value)
    nothing_is_left(traces, temporary)


def test_the_first_failure_by_time_comes_first() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(fail_one_after_the_other, 3)
    first, *rest = str(caught.value).split("\n\n")
    assert caught.value.rank == 2 and first.endswith("ValueError: rank 2 fails")
    assert rest == ["then rank 1: ValueError: rank 1 fails", "then rank 0: ValueError: rank 0 fails"]


def test_after_a_failure_ranks_that_go_on_are_ended_before_the_limit() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(fail_beside_a_sleeper_and_a_stopped_rank, 3)
    assert time.monotonic() - begin < 30
    text = str(caught.value)
    assert caught.value.rank == 1 and "ValueError: awake" in text
    assert f"then rank 0: {ENDED}" in text and f"then rank 2: {ENDED}" in text
    assert "--- output of rank 0 ---" in text and "in sleep_for_good" in text


def test_a_hang_ends_at_the_limit_and_says_where(traces: Path, temporary: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(hang, 2, traces, timeout_s=10.0)
    first, follower, *outputs = str(caught.value).split("\n\n")
    assert caught.value.rank == 1
    assert first == f"rank 1 of 2: {ENDED} (limit: 10 s); its output says where it stood"
    assert follower.startswith("then rank 0: ") and "imed out" in follower
    assert outputs[-1].startswith("--- output of rank 1 ---") and "in sleep_for_good" in outputs[-1]
    nothing_is_left(traces, temporary)


def test_a_killed_rank_is_named(traces: Path, temporary: Path) -> None:
    with pytest.raises(RankError, match=r"^rank 1 of 2: died without a word, exit code -9 \(SIGKILL\)\n") as caught:
        run_ranks(kill_itself, 2, traces)
    assert caught.value.rank == 1 and "then rank 0: RuntimeError" in str(caught.value)
    nothing_is_left(traces, temporary)


@pytest.mark.parametrize("code", [0, 7])
def test_a_rank_that_leaves_is_named(code: int) -> None:
    with pytest.raises(RankError, match=f"^rank 0 of 2: died without a word, exit code {code}\n"):
        run_ranks(exit_with, 2, code)


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RankError, match="cannot write the result of give_a_function, a <class 'function'>"):
        run_ranks(give_a_function, 1)


def test_a_nested_function_is_refused(temporary: Path) -> None:
    with pytest.raises((AttributeError, TypeError), match="(?i)can't pickle"):
        run_ranks(lambda: 0, 1)
    assert list(temporary.iterdir()) == []


def test_a_warning_is_an_error() -> None:
    with pytest.raises(RankError, match="UserWarning: old habit"):
        run_ranks(warn, 1)


@pytest.mark.filterwarnings("ignore:old habit")
def test_a_warning_that_the_caller_ignores_is_ignored() -> None:
    assert run_ranks(warn, 1) == ["warned"]
