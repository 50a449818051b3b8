"""Replica groups: a lost one changes nothing but speed, and comes back to the same bits.

Groups run in threads of one process, where one is lost by an error at a moment of the test's choice, and as processes
that are killed.
"""

import json
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from replica_groups import (
    LONG_S,
    Lost,
    Processes,
    built_group,
    check_told,
    in_threads,
    lighthouse,
    small_run,
    told,
    wait_until,
)

from core.config import cli
from core.config.derive import derive
from core.config.errors import UserError
from core.config.recipe import recipes
from core.config.record import diff
from core.config.validate import validate
from core.train.outcome import RunResult
from fault_tolerance import configs
from fault_tolerance.replicas import Replicas
from fault_tolerance.trainer import FaultTolerantTrainer
from qwen3.configs import qwen3_0_6b, qwen3_debug

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # torchft's logger
STEPS = 12


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def group_in(folder: Path, address: str, group: int, *, steps: int = STEPS, **events: Any) -> RunResult:
    """The run of a group of two, in this thread."""
    replicas = Replicas.Config(lighthouse=address, group=group, n_groups=2)
    return built_group(small_run(folder, steps=steps), replicas, **events).run()


def test_a_lost_group_changes_nothing_but_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group 1 is lost in step 4, comes back at step 8, and has other weights than the rest before step 10."""
    plain = small_run(tmp_path, steps=STEPS)
    plain.dump_folder = str(tmp_path / "plain")
    plain.build().run()
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(torch, "load", None)
    both = {"together_at": [1, 2, 3, 8, 9, 10, 11, STEPS]}

    def lost_and_back(address: str) -> None:
        with pytest.raises(Lost):
            group_in(tmp_path, address, 1, lost_at=4, **both)
        wait_until(lambda: any(line["kind"] == "counted" and line["step"] == 7 for line in told(tmp_path)))
        group_in(tmp_path, address, 1, apart_at=10, **both)

    in_threads(lambda address: group_in(tmp_path, address, 0, **both), lost_and_back)
    steps = check_told(tmp_path, STEPS)
    assert [step["n"] for step in steps.values()] == [2, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    for step, expected in zip(steps.values(), records(tmp_path / "plain"), strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    check_records(tmp_path)


def check_records(folder: Path) -> None:
    """The first group saved and validated, for all; both tell of the same steps."""
    first, second = (folder / "run" / f"group-{n}" for n in range(2))
    plain = records(folder / "plain")[-1]
    for name in ("loss", "tokens", "moe/max_over_mean_load", "moe/balance_loss"):
        assert records(first)[-1][name] == pytest.approx(plain[name], rel=1e-4), name
        assert records(second)[-1][name] == records(first)[-1][name]
    assert records(first)[-1]["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-4)
    assert records(second)[-1]["validation_loss"] is None
    assert [(folder / "checkpoint" / f"step-{STEPS}").exists() for folder in (first, second)] == [True, False]
    assert json.loads((folder / "run" / "finished.json").read_text())["step"] == STEPS
    assert [each["step"] for each in records(second)] == list(range(8, STEPS + 1))
    (before,) = second.glob("metrics.attempt-*.jsonl")
    assert len(before.read_text().splitlines()) == 3


def test_groups_of_other_settings_are_refused(tmp_path: Path) -> None:
    small_run(tmp_path, steps=3)

    def wrong_then_right(address: str) -> RunResult:
        config = small_run(tmp_path, steps=3)
        config.optimizer.lr = 1.0
        with pytest.raises(UserError, match=r"optimizer\.lr 0\.004 there, 1\.0 here"):
            built_group(config, Replicas.Config(lighthouse=address, group=1, n_groups=2), together_at=[1]).run()
        return group_in(tmp_path, address, 1, steps=3)

    in_threads(lambda address: group_in(tmp_path, address, 0, steps=3, together_at=[1]), wrong_then_right)
    assert check_told(tmp_path, 3)[1]["n"] == 2


def test_a_group_goes_on_when_the_process_of_another_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, in an attempt at step 3. That a process comes back is for the session `faults`."""
    n_steps = 5
    small_run(tmp_path, steps=1)
    with lighthouse() as address:
        other = Processes(tmp_path, address, n_steps=n_steps, meetings=(1,), numbers=(1,), timeout_s=LONG_S)
        try:
            group_in(tmp_path, address, 0, steps=n_steps, together_at=(1,), at={3: lambda _: other.end()})
        finally:
            other.end()
    assert [step["n"] for step in check_told(tmp_path, n_steps).values()] == [2, 2, 1, 1, 1]


def test_a_dry_run_plans_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--fault_tolerance.n_groups", "2", "--fault_tolerance.lighthouse", "http://a:1", "--dump_folder", "x"]
    cli.main(configs, ["--config", "fault_tolerance_debug", *two, "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["microbatches"]) == (16, 1)
    assert found["traffic"] == [
        {"axis": "groups", "collective": "all-reduce", "calls": 1, "bytes": found["gradients_bytes"]}
    ]
    assert not os.path.exists("x")


def test_recipes_differ_from_those_that_they_are_derived_from_in_the_groups() -> None:
    bases = {
        "fault_tolerance_debug": qwen3_debug,
        "diloco_debug": qwen3_debug,
        "fault_tolerance_qwen3_0_6b": qwen3_0_6b,
    }
    assert recipes(configs).keys() == bases.keys()
    for name, recipe in recipes(configs).items():
        config = recipe()
        validate(config)
        changed = {path: value for path, _, value in diff(config, bases[name]())}
        groups = {path: changed.pop(path) for path in list(changed) if path.startswith("fault_tolerance.")}
        assert changed == {"class": "fault_tolerance.trainer:FaultTolerantTrainer"}
        assert groups["fault_tolerance.method"] == ("diloco" if name == "diloco_debug" else "every_step")
        assert groups["fault_tolerance.n_groups"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_groups": 2}, "lighthouse: n_groups 2 need a lighthouse"),
        ({"group": 1}, "group: group 1 is none of n_groups 1: use 0 to 0"),
        ({"min_replicas": 2}, "min_replicas: min_replicas 2 must be from 1 to n_groups 1"),
        ({"lighthouse": "a:1"}, "lighthouse: lighthouse a:1 must be http://HOST:PORT"),
        ({"lighthouse": "http://a"}, "lighthouse: lighthouse http://a must be http://HOST:PORT"),
        ({"outer_momentum": 1.0}, "outer_momentum: outer_momentum 1.0 must be in"),
        ({"method": "diloco", "sync_steps": 3}, "checkpoint.interval: interval 500 must be a multiple of"),
        ({"timeout_s": 0}, "timeout_s: timeout_s 0 must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    config = configs.fault_tolerance_debug()
    for name, value in changes.items():
        setattr(config.fault_tolerance, name, value)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        config.build()


def test_layouts_that_groups_do_not_work_with_are_refused() -> None:
    config = configs.fault_tolerance_debug()
    config.parallelism.pipeline_parallel_degree, config.parallelism.cpu_offload = 2, True
    config.optimizer.in_backward = True
    config.fault_tolerance.n_groups, config.fault_tolerance.timeout_s = 2, 100
    config.checkpoint.enable, config.checkpoint.folder = True, "s3://bucket/run"
    with pytest.raises(UserError) as caught:
        validate(config)
    paths = ["parallelism.pipeline_parallel_degree", "parallelism.cpu_offload", "optimizer.in_backward"]
    for path in [*paths, "checkpoint.folder", "fault_tolerance.timeout_s"]:
        assert f"{path}: " in str(caught.value)
    assert isinstance(config, FaultTolerantTrainer.Config)


def test_without_a_lighthouse_a_group_says_so(tmp_path: Path) -> None:
    replicas = Replicas.Config(lighthouse="http://127.0.0.1:9", timeout_s=1)
    config = derive(small_run(tmp_path, steps=1), FaultTolerantTrainer.Config, fault_tolerance=replicas)
    with pytest.raises(UserError, match=r"no lighthouse answers at http://127\.0\.0\.1:9"):
        config.build().run()


def test_a_port_that_another_process_has_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = derive(small_run(tmp_path, steps=1), FaultTolerantTrainer.Config)
    with socket.create_server(("::", 0), family=socket.AF_INET6) as server:
        monkeypatch.setenv("TORCHFT_MANAGER_PORT", str(server.getsockname()[1]))
        with pytest.raises(UserError, match=r"^TORCHFT_MANAGER_PORT \d+ is a port that another process has"):
            config.build().run()
