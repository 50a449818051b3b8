"""Groups of processes that are killed and stopped at random moments, again and again (the session `faults`)."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from replica_groups import Processes, check_told, lighthouse, small_run, told

STEPS = 60
MEETINGS = (1, 20, 40, 60)
"""Steps that wait until both groups are there: a group that was killed takes longer to start than the rest of a run."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of core's run on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    small_run(folder, steps=STEPS).build().run()
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def processes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    config = small_run(tmp_path, steps=1)
    config.dump_folder = str(tmp_path / "text-prepared")
    config.build()
    with lighthouse() as address:
        found = Processes(tmp_path, address, n_steps=STEPS, meetings=MEETINGS, **getattr(request, "param", {}))
        try:
            yield found
        finally:
            found.end()


def disturb(processes: Processes, seed: int) -> str:
    """Two kills and a stop at random steps, of random groups; returns them in words."""
    draw = random.Random(seed)
    kinds = draw.sample(["kill", "kill", "stop"], 3)
    steps = sorted(draw.sample(range(2, STEPS - 3), 3))
    victims = [draw.randrange(2) for _ in kinds]
    for kind, step, victim in zip(kinds, steps, victims, strict=True):
        processes.wait_for(step)
        time.sleep(draw.random() * 0.2)
        processes.kill(victim) if kind == "kill" else processes.stop(victim, 2 + 13 * draw.random())  # a sum waits 10 s
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
@pytest.mark.parametrize(
    "processes", [{"n_ranks": 2, "axis": axis} for axis in ("", "tensor", "expert", "context")], indirect=True
)
def test_groups_of_two_ranks(processes: Processes, undisturbed: list[float]) -> None:
    """Two ranks in each of two groups; one group is killed."""
    processes.wait_for(5)
    processes.kill(1)
    processes.finish()
    report(processes, undisturbed, f"2 ranks ({processes.axis or 'FSDP'}) in each of 2 groups, kill 1 at 5")


def report(processes: Processes, undisturbed: list[float], words: str) -> None:
    """Check all that is claimed of a run, and print what was found."""
    steps = check_told(processes.folder, STEPS, processes.n_ranks)
    worst = max(abs(step["loss"] - loss) for step, loss in zip(steps.values(), undisturbed, strict=True))
    alone = sum(step["n"] == 1 for step in steps.values())
    lines = told(processes.folder)
    counted = {line["attempt"] for line in lines if line["kind"] == "counted"}
    in_vain = len({line["attempt"] for line in lines} - counted)
    lost = len(counted - {step["attempt"] for step in steps.values()})
    print(
        f"{words}; {alone} of {STEPS} steps alone, {in_vain} attempts in vain, {lost} steps lost with the group that "
        f"had them and taken again, losses within {worst:.1e}"
    )
    assert worst < 1e-4
    assert steps[1]["n"] == steps[STEPS]["n"] == 2
