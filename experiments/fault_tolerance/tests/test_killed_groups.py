"""Groups of processes that are killed and stopped at random moments, again and again (the session `faults`)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import replica_groups
from replica_groups import check_told, lighthouse, small_run, told

STEPS = 60
MEETINGS = "1,20,40,60"
"""Steps that wait until both groups are there: a group that was killed takes longer to start than the rest of a run."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of core's run on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    small_run(folder, steps=STEPS).build().run()
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


class Processes:
    """The processes of the groups of a run; none outlives the block."""

    def __init__(self, folder: Path, address: str, *, n_ranks: int = 1) -> None:
        self.folder, self.address, self.n_ranks = folder, address, n_ranks
        self.groups = {number: self._start(number) for number in range(2)}

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={self.n_ranks}", "--rdzv-id", f"group-{number}"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        script = [replica_groups.__file__, str(self.folder), self.address, str(number), str(STEPS), MEETINGS]
        command = [sys.executable, *(launcher if self.n_ranks > 1 else []), *script]
        log = (self.folder / f"log-{number}").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, step: int) -> None:
        """Wait until a step has counted."""
        while not any(line["kind"] == "counted" and line["step"] >= step for line in told(self.folder)):
            assert all(group.poll() in (None, 0) for group in self.groups.values()), self.logs()
            time.sleep(0.02)

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

    def finish(self) -> None:
        """Wait for the end of all."""
        assert [group.wait() for group in self.groups.values()] == [0, 0], self.logs()

    def logs(self) -> str:
        return "\n".join((self.folder / f"log-{number}").read_text()[-3000:] for number in self.groups)


def signal_all(group: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal to all processes of a group that is still there."""
    if group.poll() is None:
        os.killpg(group.pid, number)


@pytest.fixture
def processes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    config = small_run(tmp_path, steps=1)
    config.dump_folder = str(tmp_path / "text-prepared")
    config.build()
    with lighthouse() as address:
        found = Processes(tmp_path, address, n_ranks=getattr(request, "param", 1))
        try:
            yield found
        finally:
            for group in found.groups.values():
                signal_all(group, signal.SIGKILL)
                group.wait()


def disturb(processes: Processes, seed: int) -> str:
    """Two kills and a stop at random steps, of random groups; returns them in words."""
    draw = random.Random(seed)
    kinds = draw.sample(["kill", "kill", "stop"], 3)
    steps = sorted(draw.sample(range(2, STEPS - 3), 3))
    victims = [draw.randrange(2) for _ in kinds]
    for kind, step, victim in zip(kinds, steps, victims, strict=True):
        processes.wait_for(step)
        time.sleep(draw.random() * 0.2)
        processes.kill(victim) if kind == "kill" else processes.stop(victim, 3 + 3 * draw.random())
    processes.finish()
    return ", ".join(f"{kind} {victim} at {step}" for kind, step, victim in zip(kinds, steps, victims, strict=True))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_two_kills_and_a_stop_change_nothing_but_speed(
    processes: Processes, undisturbed: list[float], seed: int
) -> None:
    told_of = disturb(processes, seed)
    report(processes, undisturbed, f"seed {seed}: {told_of}")


@pytest.mark.faults
@pytest.mark.parametrize("processes", [2], indirect=True)
def test_groups_of_two_ranks_that_share_weights(processes: Processes, undisturbed: list[float]) -> None:
    """FSDP of two ranks in each of two groups; one group is killed."""
    processes.wait_for(5)
    processes.kill(1)
    processes.finish()
    report(processes, undisturbed, "FSDP 2 in each of 2 groups")


def report(processes: Processes, undisturbed: list[float], words: str) -> None:
    """Check all that is claimed of a run, and print what was found."""
    steps = check_told(processes.folder, STEPS, processes.n_ranks)
    worst = max(abs(step["loss"] - loss) for step, loss in zip(steps.values(), undisturbed, strict=True))
    alone = sum(step["n"] == 1 for step in steps.values())
    tried = {line["attempt"] for line in told(processes.folder)}
    print(f"{words}; {alone} of {STEPS} steps alone, {len(tried) - STEPS} attempts in vain, losses within {worst:.1e}")
    assert worst < 1e-4
    assert steps[1]["n"] == steps[STEPS]["n"] == 2
