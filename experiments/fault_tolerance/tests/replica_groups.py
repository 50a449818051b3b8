"""Replica groups that tests train: a small run, what a group did in it, and the command of a group that may be killed.

A group writes a line for each attempt, before its part of the sums is complete, and one for each step that counted,
with the bytes of its weights, and of all its state, in a few letters.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from core.checkpoint.settings import Checkpoint
from core.config.derive import derive
from core.optim.adam import AdamW
from core.optim.weight import local_tensor
from core.step.update import StepInfo
from core.train.trainer import Trainer
from core.train.validate import Validator
from fault_tolerance.replicas import Replicas
from fault_tolerance.trainer import FaultTolerantTrainer
from qwen3.configs import qwen3_moe_debug
from qwen3.model import sparse

os.environ.setdefault("RUST_LOG", "error")  # before torchft is imported
ROWS, AT_ONCE = 8, 2
"""Rows of a step, and of a microbatch."""
LONG_S = 600
"""Nothing that goes right takes so long, whatever else the machine does."""


class Lost(Exception):
    """The end of a group, as its own thread sees it."""


class Watched(FaultTolerantTrainer):
    """A group that writes down what it does, and meets with what a test wants."""

    lost_at = 0
    """The group ends in an attempt at this step."""
    apart_at = 0
    """Before this step the group's weights become others than those of the rest."""
    together_at: Sequence[int] = ()
    """Steps that wait until all groups are there."""
    at: Mapping[int, Callable[["Watched"], None]] = MappingProxyType({})
    """What is done to the group in an attempt at a step."""

    def tell(self, kind: str, **numbers: Any) -> None:
        """Append a line, after whatever a kill left of the last one."""
        rank = self.world.rank
        place = self.folder.parent / f"told-{self.config.fault_tolerance.group}-{rank}.jsonl"
        with place.open("a") as file:
            file.write("\n" + json.dumps({"kind": kind, "rank": rank, **numbers}) + "\n")

    def _begin(self) -> int:
        state = self.replicas.state
        if state.step + 1 == self.apart_at:
            self.apart_at, state.history = 0, 1
            next(self.built.models[0].parameters()).data.add_(1)
        while True:
            step = super()._begin()
            if step not in self.together_at or self.replicas.n == self.config.fault_tolerance.n_groups:
                return step
            time.sleep(0.05)

    def _attempt(self, step: int) -> StepInfo:
        replicas = self.replicas
        attempt = {"step": step, "attempt": replicas._attempt, "number": replicas.number, "n": replicas.n}
        attempt["data_rank"] = self.layout.data_rank
        own = [row for first in self.dealt.starts(step) for row in range(first, first + AT_ONCE)]
        self.tell("attempt", rows=own, **attempt)
        if step == self.lost_at:
            raise Lost
        if step in self.at:
            self.at[step](self)
        before = replicas.state.history
        info = super()._attempt(step)
        spikes = json.dumps(self.checkpoints.spikes.state())
        digests = {"weights": digest(replicas.state.model), "state": digest(replicas.state.tensors()), "spikes": spikes}
        attempt |= {"before": before, "after": replicas.state.history}
        self.tell("counted", loss=info.loss, grad_norm=info.grad_norm, **digests, **attempt)
        return info


def digest(tensors: dict[str, Tensor]) -> str:
    """The bytes of tensors of any shape in a few letters."""
    joined = sha256()
    for tensor in tensors.values():
        joined.update(local_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return joined.hexdigest()[:16]


def small_run(folder: Path, *, steps: int) -> Trainer.Config:
    """A run of a small Qwen3 with experts, on a text of one page whose rows differ in how many labels count."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for n in range(60):
            line = f"{n} green bottles hanging on the wall, and if {n % 7} should fall there will be {n - n % 7}\n"
            (text / f"{n:02}.txt").write_text(line * (2 + n % 3))
    config = qwen3_moe_debug()
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=2_048, max_seq_len=64)
    config.model = sparse(n_experts=4, top_k=2, hidden_dim=16, **sizes)
    config.model.moe.router.load_balance_coeff = 1e-2
    config.dataloader.dataset, config.dataloader.cache_folder = str(text), str(folder / "cache")
    config.training.steps, config.training.seq_len, config.training.device = steps, 32, "cpu"
    config.training.local_batch_size, config.training.global_batch_size = AT_ONCE, ROWS
    config.optimizer = AdamW.Config(lr=4e-3, ema_decay=0.9)
    config.debug.on_spike, config.debug.spike_window, config.debug.spike_z_score = "skip", 3, 1e6
    config.validator, config.checkpoint = Validator.Config(enable=True, freq=1000, steps=1), Checkpoint(enable=True)
    config.comm.train_timeout_seconds = 2 * LONG_S
    config.metrics.log_freq, config.activation_checkpoint.mode = 1, "none"
    config.dump_folder = str(folder / "run")
    return config


def built_group(
    config: Trainer.Config, replicas: Replicas.Config, *, timeout_s: int = LONG_S, **events: Any
) -> Watched:
    """A replica group of that run, and what it meets with: attributes of `Watched`."""
    replicas = replace(replicas, timeout_s=timeout_s, quorum_timeout_s=LONG_S)
    trainer = derive(config, Watched.Config, fault_tolerance=replicas).build()
    for name, value in events.items():
        setattr(trainer, name, value)
    return trainer


def wait_until(found: Callable[[], bool]) -> None:
    """Wait for something that another thread or process does. Raises `TimeoutError` where it does not."""
    deadline = time.monotonic() + LONG_S
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came")
        time.sleep(0.02)


def told(folder: Path) -> list[dict[str, Any]]:
    """What all ranks of all groups wrote down; a line that a kill tore is left out."""
    lines = [line for file in (folder / "run").glob("told-*.jsonl") for line in file.read_text().split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


@contextmanager
def lighthouse() -> Iterator[str]:
    """The address of a lighthouse while the block runs."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=60_000, heartbeat_timeout_ms=2_000)
    try:
        yield f"http://127.0.0.1:{urlsplit(server.address()).port}"
    finally:
        server.shutdown()


def in_threads(*groups: Callable[[str], Any]) -> list[Any]:
    """What each of the groups returns, run at once at one lighthouse, whose address they get. When one fails the
    lighthouse ends, and with it the others, which would wait for that one."""
    with ThreadPoolExecutor(len(groups)) as threads, ExitStack() as opened:
        address = opened.enter_context(lighthouse())
        futures = [threads.submit(group, address) for group in groups]
        for future in as_completed(futures):
            if future.exception() is not None:
                opened.close()
    failed = [error for each in futures if (error := each.exception()) is not None]
    if failed:
        raise ExceptionGroup("groups failed", failed)
    return [each.result() for each in futures]


def check_told(folder: Path, n_steps: int, n_ranks: int = 1) -> dict[int, dict[str, Any]]:
    """A line of each step that counted in the run, after checks: a rank had the same bits afterwards in all groups that
    counted it, and its rows are those of a run of one group, each read by one.

    Back from the last step: steps that lost groups alone had are no part of the run, which took them again.
    """
    lines, steps = told(folder), {}
    rows: dict[int, dict[tuple[int, int], list[int]]] = {step: {} for step in range(1, n_steps + 1)}
    for rank in range(n_ranks):
        own = [line for line in lines if line["rank"] == rank]
        ends = {line["after"] for line in own if line["kind"] == "counted" and line["step"] == n_steps}
        assert len(ends) == 1, f"the run has {len(ends)} ends"
        (after,) = ends
        for step in range(n_steps, 0, -1):
            counted = [line for line in own if line.get("after") == after]
            assert counted, f"step {step} never counted"
            keys = ("step", "attempt", "n", "loss", "grad_norm", "weights", "state", "spikes", "before")
            assert len({tuple(line[key] for key in keys) for line in counted}) == 1, counted
            steps[step] = counted[0]
            tried = [line for line in own if line["kind"] == "attempt" and line["attempt"] == steps[step]["attempt"]]
            assert {line["step"] for line in counted + tried} == {step}
            assert sorted(line["number"] for line in tried) == list(range(steps[step]["n"]))
            for line in tried:  # ranks that share tokens read the same rows
                assert rows[step].setdefault((line["number"], line["data_rank"]), line["rows"]) == line["rows"]
            after = steps[step]["before"]
    for step, found in rows.items():
        read = sorted(row for each in found.values() for row in each)
        assert read == list(range(ROWS * (step - 1), ROWS * step)), f"step {step} has the rows {found}"
    return {step: steps[step] for step in sorted(steps)}


class Processes:
    """The processes of the groups of a run; none outlives the block."""

    def __init__(
        self,
        folder: Path,
        address: str,
        *,
        n_steps: int,
        meetings: Sequence[int],
        n_ranks: int = 1,
        axis: str = "",
        numbers: Sequence[int] = (0, 1),
        timeout_s: int = 10,
    ) -> None:
        """`axis` is that of which a group of several ranks has them, FSDP's without it; `numbers` are of the groups."""
        self.folder, self.address, self.n_ranks, self.axis = folder, address, n_ranks, axis
        self.settings = [str(n_steps), ",".join(map(str, meetings)), axis, str(timeout_s)]
        self.groups = {number: self._start(number) for number in numbers}

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={self.n_ranks}", "--rdzv-id", f"group-{number}"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        script = [__file__, str(self.folder), self.address, str(number)]
        script += self.settings
        command = [sys.executable, *(launcher if self.n_ranks > 1 else []), *script]
        with (self.folder / f"log-{number}").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, step: int) -> None:
        """Wait until a step has counted."""

        def has_counted() -> bool:
            self._check()
            return any(line["kind"] == "counted" and line["step"] >= step for line in told(self.folder))

        wait_until(has_counted)

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of a group, which is started again."""
        signal_all(self.groups[number], signal.SIGKILL)
        self.groups[number].wait()
        self.groups[number] = self._start(number)

    def stop(self, number: int, seconds: float) -> None:
        """SIGSTOP, and after a while SIGCONT."""
        signal_all(self.groups[number], signal.SIGSTOP)
        time.sleep(seconds)
        signal_all(self.groups[number], signal.SIGCONT)

    def end(self) -> None:
        """Kill what is left."""
        for group in self.groups.values():
            signal_all(group, signal.SIGKILL)
            group.wait()

    def finish(self) -> None:
        """Wait for the end of all, which must be a good one."""

        def have_ended() -> bool:
            self._check()
            return all(group.poll() == 0 for group in self.groups.values())

        wait_until(have_ended)

    def _check(self) -> None:
        assert all(group.poll() in (None, 0) for group in self.groups.values()), self.logs()

    def logs(self) -> str:
        return "\n".join((self.folder / f"log-{number}").read_text()[-3000:] for number in self.groups)


def signal_all(group: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal to all processes of a group that is still there."""
    if group.poll() is None:
        os.killpg(group.pid, number)


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_group(place: str, address: str, number: str, n_steps: str, meetings: str, axis: str, timeout_s: str) -> None:
    """The run of a process."""
    die_with_parent()
    torch.set_num_threads(1)
    replicas = Replicas.Config(lighthouse=address, group=int(number), n_groups=2)
    together = list(map(int, meetings.split(",")))
    config = small_run(Path(place), steps=int(n_steps))
    if axis:
        setattr(config.parallelism, f"{axis}_parallel_degree", 2)
    built_group(config, replicas, timeout_s=int(timeout_s), together_at=together).run()


if __name__ == "__main__":
    import replica_groups  # under the name by which records name its classes

    replica_groups.run_group(*sys.argv[1:])
