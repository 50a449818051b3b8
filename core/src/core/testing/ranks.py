"""Ranks for tests: processes joined by gloo, forked from a server that imports torch once per pytest run."""

import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

PRELOAD = [
    "core.testing.ranks",
    "core.parallel.many_ranks",
    "core.train.trainer",
    "pytest",
    "torch._dynamo",
    "torch._functorch.partitioners",  # what checkpointed blocks import
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
]
FOLLOWS = re.compile(r"connection (closed|refused|reset)|broken pipe|timed out|timeout (after|caused)", re.IGNORECASE)
"""What gloo and the store say in a rank that misses another one: that other one failed first."""
EXIT_GRACE_S = 3.0  # how long the others may go on after the first failure, and how long dying may take
SHOWN_CHARACTERS = 10_000  # characters of a rank's output that an error shows, the last ones


class RankError(AssertionError):
    """A rank failed, died or did not answer; `rank` is the first that did, the text has its traceback."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True)
class Call:
    """What every rank of a call is told; what is to be called lies in the folder, read where errors are reported."""

    folder: Path
    timeout_s: float
    environ: dict[str, str]
    filters: list[Any]

    def file(self, what: str, rank: int) -> Path:
        return self.folder / f"{what}-{rank}"


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """The results of `function(*args)` on each of `world_size` ranks, in order of rank.

    Every rank is a fresh process of one thread, with a gloo process group, torchrun's environment variables, and the
    caller's warning filters, module path and environment. `function` stands at the top of a module; arguments and
    results are what `torch.save` can write, tensors on the CPU among them.

    Errors: RankError with the traceback of the rank that failed first and what the ranks printed. Ranks that have not
    answered `timeout_s` after their start are killed; the error then shows where they stood.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # a server of several threads could not fork safely
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        torch.save((function, args), Path(folder, "call"))
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        call = Call(Path(folder), timeout_s, _environ(world_size, store.port), list(warnings.filters))
        processes = [context.Process(target=_rank, args=(rank, call)) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            ended = _wait(processes, call)
        finally:
            codes = _end(processes)
            del store  # an error keeps this frame, which must not keep the port
        failures = _failures(codes, call, ended)
        if failures:
            raise RankError(failures[0].rank, _report(failures, call, world_size))
        return [torch.load(call.file("result", rank), weights_only=False) for rank in range(world_size)]


def _environ(world_size: int, port: int) -> dict[str, str]:
    """The caller's environment with what torchrun adds; RANK and LOCAL_RANK are the rank's own."""
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**os.environ, **sizes, **master}


def _rank(rank: int, call: Call) -> None:
    """The life of one rank: whatever goes wrong ends up in its files."""
    gc.freeze()  # what the server imported is no garbage
    output = call.file("output", rank).open("w", encoding="utf-8", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    faulthandler.enable(output)
    faulthandler.register(signal.SIGUSR2, output, chain=True)  # says where the rank stands, then dies
    signal.alarm(int(call.timeout_s + 10 * EXIT_GRACE_S))  # should the caller be killed and kill no one
    try:
        _work(rank, call)
    except BaseException:
        moment = time.monotonic()
        call.file("failure", rank).write_text(f"{moment}\n{traceback.format_exc()}", encoding="utf-8")
        os._exit(1)  # at once, so that those who wait for this rank learn of it


def _work(rank: int, call: Call) -> None:
    os.environ.clear()
    os.environ.update(call.environ, RANK=str(rank), LOCAL_RANK=str(rank))
    missing = [name for name in PRELOAD if name not in sys.modules]
    assert not missing, f"the server that forks ranks could not import {missing}: are they installed, or on PYTHONPATH?"
    warnings.resetwarnings()
    for action, message, category, module, line in call.filters:
        warnings.filterwarnings(action, _source(message), category, _source(module), line, append=True)
    torch.set_num_threads(1)
    function, args = torch.load(call.folder / "call", weights_only=False)
    master = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore("run_ranks", master)  # a group that the function makes after this one meets no stale keys
    world_size, patience = int(os.environ["WORLD_SIZE"]), timedelta(seconds=0.8 * call.timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    result = function(*args)
    try:
        torch.save(result, call.file("result", rank))
    except Exception as error:
        raise TypeError(f"torch.save cannot write the result of {function.__name__}, a {type(result)}") from error
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while others may still read from it
        dist.destroy_process_group()


def _source(pattern: re.Pattern[str] | str | None) -> str:
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern or ""


def _wait(processes: Sequence[BaseProcess], call: Call) -> dict[int, float]:
    """rank -> when it ended by itself; stops at the time limit, and a little after the first failure."""
    ended: dict[int, float] = {}
    limit = time.monotonic() + call.timeout_s
    while len(ended) < len(processes) and (left := limit - time.monotonic()) > 0:
        running = [rank for rank in range(len(processes)) if rank not in ended]
        connection.wait([processes[rank].sentinel for rank in running], left)
        for rank in running:
            if (code := processes[rank].exitcode) is not None:
                ended[rank] = time.monotonic()
                if not _answered(rank, code, call):
                    limit = min(limit, ended[rank] + EXIT_GRACE_S)
    return ended


def _answered(rank: int, code: int | None, call: Call) -> bool:
    return code == 0 and call.file("result", rank).exists()


def _end(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Leave no process: those still there write where they stand and die, or are killed; the exit codes of all."""
    left = [process for process in processes if process.is_alive()]
    for process in left:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR2)
    limit = time.monotonic() + EXIT_GRACE_S
    for process in left:
        process.join(max(0.0, limit - time.monotonic()))
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.close()
    return codes


@dataclass(frozen=True)
class Failure:
    """Why a rank has no result: when that came about, and its traceback or one sentence."""

    rank: int
    moment: float
    text: str

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts the failure that others follow from to the front."""
        message = self.text.rpartition("\n  File ")[2]
        return bool(FOLLOWS.search(message)), self.moment


def _failures(codes: list[int | None], call: Call, ended: dict[int, float]) -> list[Failure]:
    """What went wrong, the cause first."""
    failures = []
    for rank, code in enumerate(codes):
        if _answered(rank, code, call):
            continue
        if call.file("failure", rank).exists():
            moment, text = call.file("failure", rank).read_text(encoding="utf-8").split("\n", maxsplit=1)
            failures.append(Failure(rank, float(moment), text.rstrip()))
        elif rank in ended:
            name = f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""
            failures.append(Failure(rank, ended[rank], f"died without a word, exit code {code}{name}"))
        else:
            text = f"had not answered and was ended (limit: {call.timeout_s:g} s); its output says where it stood"
            failures.append(Failure(rank, time.monotonic(), text))
    return sorted(failures, key=lambda failure: failure.order)


def _report(failures: list[Failure], call: Call, world_size: int) -> str:
    first, *others = failures
    parts = [f"rank {first.rank} of {world_size}: {first.text}"]
    parts += [f"then rank {failure.rank}: {failure.text.splitlines()[-1]}" for failure in others]
    for rank in range(world_size):
        path = call.file("output", rank)
        if path.exists() and (text := path.read_text(encoding="utf-8", errors="replace").strip()):
            parts.append(f"--- output of rank {rank} ---\n{text[-SHOWN_CHARACTERS:]}")
    return "\n\n".join(parts)
