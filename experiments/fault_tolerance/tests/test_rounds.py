"""LocalSGD and DiLoCo: rounds of steps that groups take by themselves, against the formulas by hand."""

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from replica_groups import Lost, Watched, built_group, in_threads, small_run, told
from torch import Tensor

from core.step.update import train_step
from core.train.state import optimizer_tensors
from core.train.trainer import Trainer
from fault_tolerance.replicas import Replicas

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # torchft's logger
SYNC, STEPS = 3, 8
"""Steps of a round; the last round has two."""
Method = Literal["local_sgd", "diloco"]


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in trainer.built.named_parameters()}


def by_hand(folder: Path, method: Method) -> dict[str, Tensor]:
    """The weights after the run, of two trainers that each take every second microbatch, and PyTorch's own SGD."""
    trainers = []
    for n in range(2):
        config = small_run(folder, steps=STEPS)
        config.dump_folder = str(folder / f"by-hand-{n}")
        trainers.append(config.build())
    outer = [weight.clone().requires_grad_() for weight in parameters(trainers[0]).values()]
    biases = [
        [module.selection_bias for module in each.built.models[0].modules() if hasattr(module, "selection_bias")]
        for each in trainers
    ]
    sgd = torch.optim.SGD(outer, lr=0.7, momentum=0.9, nesterov=True)
    for step in range(1, STEPS + 1):
        for n, trainer in enumerate(trainers):
            rows, settings = trainer.batches(step)[n::2], {"max_norm": 1.0, "on_nonfinite": "stop"}
            factor = trainer.schedule.factor(step)
            train_step(trainer.objective, trainer.optimizer, rows, step=step, lr_factor=factor, **settings)
        if step % SYNC and step != STEPS:
            continue
        found = [list(parameters(trainer).values()) for trainer in trainers]
        for weight, first, second in zip(outer, *found, strict=True):
            weight.grad = weight.detach() - (first + second) / 2
            if method == "local_sgd":
                weight.data.sub_(weight.grad)
        if method == "diloco":
            sgd.step()
        for each in found:
            torch._foreach_copy_(each, [weight.detach() for weight in outer])
        for first, second in zip(*biases, strict=True):
            first.copy_((first + second) / 2)
            second.copy_(first)
        if step == SYNC:  # group 1, which is lost in the next round, comes back with the moments of group 0
            moments = [optimizer_tensors(trainer.optimizer) for trainer in trainers]
            torch._foreach_copy_(list(moments[1].values()), list(moments[0].values()))
    return dict(zip(parameters(trainers[0]), (weight.detach() for weight in outer), strict=True))


def in_rounds(folder: Path, replicas: Replicas.Config, **events: Any) -> Watched:
    """A group after its run."""
    config = small_run(folder, steps=STEPS)
    config.checkpoint.interval = config.validator.freq = SYNC
    trainer = built_group(config, replace(replicas, sync_steps=SYNC), **events)
    trainer.run()
    return trainer


def asks_to_stop(trainer: Watched) -> None:
    trainer.exchange.requests.signal = signal.SIGTERM


@pytest.mark.parametrize("method", [pytest.param("local_sgd", marks=pytest.mark.matrix), "diloco"])
def test_rounds_are_those_of_the_formula_and_a_lost_one_is_done_again(tmp_path: Path, method: Method) -> None:
    """Group 1 is lost in the second step of the second round, and is there again when it is done again."""
    expected = by_hand(tmp_path, method)
    both = Replicas.Config(n_groups=2, min_replicas=2, method=method)

    def lost_and_back(address: str) -> Watched:
        replicas = replace(both, lighthouse=address, group=1)
        with pytest.raises(Lost):
            in_rounds(tmp_path, replicas, lost_at=5)
        return in_rounds(tmp_path, replicas)

    trainers = in_threads(lambda address: in_rounds(tmp_path, replace(both, lighthouse=address)), lost_and_back)
    check_rounds(tmp_path, trainers, expected)


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["local_sgd", "diloco"])
def test_rounds_of_groups_that_were_all_lost_go_on_from_what_one_saved(tmp_path: Path, method: Method) -> None:
    """Both are lost in the second step of the second round; what group 0 saved before it is the state of both."""
    expected = by_hand(tmp_path, method)
    both = Replicas.Config(n_groups=2, min_replicas=2, method=method)

    def lost(address: str, group: int) -> None:
        with pytest.raises(Lost):
            in_rounds(tmp_path, replace(both, lighthouse=address, group=group), lost_at=5)

    in_threads(*(partial(lost, group=group) for group in range(2)))
    groups = (replace(both, group=group) for group in range(2))
    trainers = in_threads(
        *(lambda address, each=each: in_rounds(tmp_path, replace(each, lighthouse=address)) for each in groups)
    )
    check_rounds(tmp_path, trainers, expected)


def test_a_run_that_is_stopped_within_a_round_of_diloco_and_goes_on_is_as_one_that_nobody_stops(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All bytes of weights, moments and outer momentum; the round that was left is taken again. Where the optimizer's
    state is not loaded the outer momentum is not either, and a line says so."""
    diloco = Replicas.Config(method="diloco")
    whole = in_rounds(tmp_path / "whole", diloco)
    left = in_rounds(tmp_path / "left", diloco, at={5: asks_to_stop})
    last_saved = left.checkpoints.last_saved()
    assert left.replicas.state.step == SYNC and last_saved is not None and last_saved.manifest.progress.step == SYNC
    without = begun_without_optimizer(tmp_path / "left", diloco)
    assert not any(tensor.any() for tensor in without.checkpoints.further.values())
    assert "checkpoint.exclude_from_loading: optimizer, outer of " in "".join(capfd.readouterr())
    again = in_rounds(tmp_path / "left", diloco)
    expected = whole.replicas.state.tensors()
    assert sum(name.startswith("outer.") and bool(tensor.any()) for name, tensor in expected.items()) > 5
    torch.testing.assert_close(again.replicas.state.tensors(), expected, rtol=0, atol=0)


def begun_without_optimizer(folder: Path, replicas: Replicas.Config) -> Watched:
    """A group that has gone on from what was saved, and takes no step."""
    config = small_run(folder, steps=STEPS)
    config.checkpoint.interval = config.validator.freq = SYNC
    config.checkpoint.exclude_from_loading = ["optimizer"]
    trainer = built_group(config, replace(replicas, sync_steps=SYNC))
    trainer.lock.__exit__()
    return trainer


def check_rounds(folder: Path, trainers: list[Watched], expected: dict[str, Tensor]) -> None:
    """Both have the weights of the formula, and the second round was taken again."""
    for trainer in trainers:
        torch.testing.assert_close(parameters(trainer), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parameters(trainers[0]), parameters(trainers[1]), rtol=0, atol=0)
    steps = [line["step"] for line in told(folder) if line["kind"] == "attempt" and line["number"] == 0]
    assert steps[-2:] == [STEPS - 1, STEPS] and steps.count(5) == 2 and steps.count(2) == 1
