"""The end of a run of replica groups, its folders, and groups that come late or wait."""

import json
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from replica_groups import AT_ONCE, Lost, Watched, built_group, in_threads, small_run, wait_until

from core.config.derive import derive
from core.config.errors import UserError
from core.config.record import to_dict
from core.runtime.ranks import ALONE
from core.step.update import StepInfo
from core.train.observers import Observer
from fault_tolerance.errors import NoQuorum, NotCommitted
from fault_tolerance.folder import set_aside
from fault_tolerance.replicas import Replicas
from fault_tolerance.trainer import FaultTolerantTrainer

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # torchft's logger
STEPS = 2
NOWHERE = "http://127.0.0.1:9"
"""Where no lighthouse listens."""


class StopsAtValidation(Observer):
    """Ends a run after the first validation."""

    @dataclass(kw_only=True, slots=True)
    class Config(Observer.Config):
        pass

    def after_step(self, info: StepInfo) -> None:
        if info.validation_loss is not None:
            self.stop("enough")


def group_of_two(folder: Path, address: str, group: int, *, steps: int = STEPS, least: int = 1) -> Watched:
    replicas = Replicas.Config(lighthouse=address, group=group, n_groups=2, min_replicas=least)
    return built_group(small_run(folder, steps=steps), replicas, together_at=range(1, steps + 1))


def saved(folder: Path, step: int = STEPS) -> list[bool]:
    """Whether each of the two groups saved a step."""
    return [(folder / "run" / f"group-{n}" / "checkpoint" / f"step-{step}").exists() for n in range(2)]


def finished(folder: Path) -> bool:
    return (folder / "run" / "finished.json").exists()


def lose_save(trainer: Watched) -> None:
    """Have the group be lost when it begins to save the last step."""
    save = trainer.checkpoints.after_step

    def after_step(step: int, *, last: bool, **how: Any) -> float:
        if last and trainer.checkpoints.saves:
            raise Lost
        return save(step, last=last, **how)

    trainer.checkpoints.after_step = after_step


def test_the_last_step_is_saved_when_the_group_that_saves_is_lost_then(tmp_path: Path) -> None:
    """Afterwards a group that comes late hears that the run is over, and one of other settings that it is another's."""

    def first(address: str) -> None:
        trainer = group_of_two(tmp_path, address, 0)
        lose_save(trainer)
        with pytest.raises(Lost):
            trainer.run()
        assert not finished(tmp_path)

    small_run(tmp_path, steps=STEPS)
    in_threads(first, lambda address: group_of_two(tmp_path, address, 1).run())
    assert saved(tmp_path) == [False, True] and finished(tmp_path)
    group_of_two(tmp_path, NOWHERE, 0, least=1).run()
    with pytest.raises(
        UserError, match=r"run holds a run of other settings, finished after step 2:\n  training\.steps"
    ):
        group_of_two(tmp_path, NOWHERE, 0, steps=1).run()
    assert saved(tmp_path) == [False, True]


@pytest.mark.faults
def test_the_last_step_is_saved_when_the_first_group_did_not_get_its_vote_through(tmp_path: Path) -> None:
    def first(address: str) -> None:
        trainer = group_of_two(tmp_path, address, 0)
        begin, commits = trainer._begin, []

        def begun() -> int:
            step, commit = begin(), trainer.replicas.commit

            def lose(step: int) -> None:
                trainer.replicas._vote()
                trainer.replicas.commit = commit
                commits.append(step)
                raise NotCommitted

            if step == STEPS:
                trainer.replicas.commit = lose
            return step

        trainer._begin = begun
        trainer.run()
        assert commits == [STEPS]

    small_run(tmp_path, steps=STEPS)
    in_threads(first, lambda address: group_of_two(tmp_path, address, 1).run())
    assert saved(tmp_path)[0] and finished(tmp_path)


def test_a_group_that_waits_for_others_saves_and_ends_when_it_is_asked_to_stop(tmp_path: Path) -> None:
    """Group 1 is lost after step 1, and without it there are too few."""
    trainers: list[Watched] = []

    def first(address: str) -> None:
        trainers.append(group_of_two(tmp_path, address, 0, steps=3, least=2))
        trainers[0].run()

    def second(address: str) -> None:
        trainer = group_of_two(tmp_path, address, 1, steps=3, least=2)
        trainer.lost_at = 2
        with pytest.raises(Lost):
            trainer.run()
        wait_until(lambda: trainers[0].replicas.n == 1)
        trainers[0].exchange.requests.signal = signal.SIGTERM

    small_run(tmp_path, steps=STEPS)
    in_threads(first, second)
    assert saved(tmp_path, 1) == [True, False] and not finished(tmp_path)


def asks_to_save(trainer: Watched) -> None:
    trainer.exchange.requests._save_asked = True  # as a signal does, of which threads get none


def test_the_group_that_saves_does_so_when_another_is_asked_to_and_its_observers_end_the_run(tmp_path: Path) -> None:
    """Of validation one group alone knows, so its observer speaks for all."""

    def group(address: str, number: int) -> Watched:
        config = small_run(tmp_path, steps=6)
        config.observers, config.validator.freq = [StopsAtValidation.Config()], 4
        replicas = Replicas.Config(lighthouse=address, group=number, n_groups=2, min_replicas=2)
        trainer = built_group(config, replicas, at={2: asks_to_save} if number else {})
        trainer.run()
        return trainer

    small_run(tmp_path, steps=STEPS)
    first, second = in_threads(partial(group, number=0), partial(group, number=1))
    assert [saved(tmp_path, step) for step in range(1, 6)] == [[step in (3, 4), False] for step in range(1, 6)]
    assert first.replicas.state.step == second.replicas.state.step == 4
    assert first.exchange.cause == "observer 0 StopsAtValidation (enough)"
    assert second.exchange.cause == "an observer of another replica group"
    assert not finished(tmp_path)


def test_a_group_without_a_quorum_saves_what_it_has(tmp_path: Path) -> None:
    def loses_lighthouse(trainer: Watched) -> None:
        def begin(**how: Any) -> None:
            raise NoQuorum("no lighthouse answers")

        trainer.replicas.begin = begin

    config = small_run(tmp_path, steps=4)
    trainer = built_group(config, Replicas.Config(), at={2: loses_lighthouse})
    with pytest.raises(NoQuorum):
        trainer.run()
    found = trainer.checkpoints.last_saved()
    assert found is not None and found.manifest.progress.step == 2


def test_groups_that_are_too_few_end_after_quorum_timeout_s() -> None:
    replicas = Replicas.__new__(Replicas)
    replicas.config = Replicas.Config(n_groups=2, min_replicas=2, quorum_timeout_s=1)
    replicas.n, replicas._ranks = 1, ALONE
    replicas._agreed, replicas._vote = lambda least, words: False, lambda: bool(time.sleep(0.1))
    with pytest.raises(UserError, match="quorum_timeout_s 1: 1 are there, and at least 2 are needed"):
        replicas.begin()


def test_a_run_goes_on_by_the_folder_of_a_group(tmp_path: Path) -> None:
    """As the command that a run prints; and building a run changes no configuration."""
    config = small_run(tmp_path, steps=STEPS)
    config.dump_folder, config.training.global_batch_size = str(tmp_path / "run" / "group-0"), -1
    replicas = Replicas.Config(lighthouse=NOWHERE, n_groups=2)
    config = derive(config, FaultTolerantTrainer.Config, fault_tolerance=replicas)
    before = to_dict(config)
    trainer = config.build()
    assert to_dict(config) == before
    assert trainer.config.training.global_batch_size == 2 * AT_ONCE
    assert trainer.folder == tmp_path / "run" / "group-0"


def test_a_group_that_is_started_twice_leaves_the_records_of_the_first(tmp_path: Path) -> None:
    trainer = group_of_two(tmp_path, NOWHERE, 1)
    records = trainer.folder / "metrics.jsonl"
    records.write_text("{}\n")
    with pytest.raises(UserError, match="group-1 is in use by another process"):
        group_of_two(tmp_path, NOWHERE, 1)
    assert records.exists()
    trainer.lock.__exit__()
    (trainer.folder / "metrics.attempt-1.jsonl").write_text("before")
    for number in (0, 2):
        records.write_text(json.dumps({"step": number}))
        set_aside(trainer.folder, trainer.config.checkpoint)
    found = [(trainer.folder / f"metrics.attempt-{n}.jsonl").read_text() for n in range(3)]
    assert found == ['{"step": 0}', "before", '{"step": 2}']
