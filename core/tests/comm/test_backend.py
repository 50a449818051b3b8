"""Which dispatcher a run gets, and what is said when it cannot have the one that it asked for."""

import json
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist

from core.comm.all_to_all import AllToAll
from core.comm.backend import Backend, dispatchers
from core.comm.deepep import DeepEP
from core.comm.reference import Reference
from core.comm.transport import Sizes, bound, release
from core.config.errors import UserError
from core.config.record import from_dict
from core.config.validate import validate
from core.parallel.settings import Degrees, Parallelism, describe_degrees
from core.step.assemble import largest_dispatch, make_dispatcher
from core.step.settings import Training
from core.testing.ranks import run_ranks
from core.testing.toy import ToyMoE
from core.train import folder
from core.train.folder import config_text
from core.train.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPREAD: dict[str, Any] = {"expert_parallel_degree": 2}


def run_of(**parallelism: Any) -> Trainer.Config:
    """A run with experts, three rows of 64 tokens at a time."""
    training = Training(local_batch_size=3, seq_len=64)
    return Trainer.Config(model=ToyMoE.Config(), training=training, parallelism=Parallelism(**parallelism, **SPREAD))


def test_settings_know_the_backends() -> None:
    assert get_type_hints(Parallelism)["expert_parallel_comm_backend"] == Backend
    assert get_args(Backend) == ("standard", "deepep", "deepep_v1", "deepep_v2", "hybridep", "reference")
    assert Parallelism().expert_parallel_comm_backend == "standard"
    for name in get_args(Backend):
        validate(Parallelism(expert_parallel_comm_backend=name, **SPREAD))


def test_a_backend_needs_experts_on_several_ranks() -> None:
    for name in ("deepep", "hybridep", "reference"):
        with pytest.raises(UserError, match=f"{name} has no effect with expert_parallel_degree 1, .*leave .* standard"):
            validate(Parallelism(expert_parallel_comm_backend=name))


@pytest.mark.parametrize(
    ("factor", "name", "message"),
    [
        (0.0, "hybridep", "factor 0.0 must be above 0 and at most 1, or None"),
        (1.5, "hybridep", "factor 1.5 must be above 0 and at most 1, or None"),
        (float("nan"), "hybridep", "factor nan must be above 0"),
        (0.5, "standard", "factor has no effect with backend standard: use hybridep, or leave it at None"),
        (0.5, "deepep", "factor has no effect with backend deepep"),
    ],
)
def test_the_capacity_factor_is_a_share_and_hybridep_s(factor: float, name: Any, message: str) -> None:
    spread = Parallelism(
        expert_parallel_comm_backend=name, hybridep_non_blocking_expert_capacity_factor=factor, **SPREAD
    )
    with pytest.raises(UserError, match=f"hybridep_non_blocking_expert_capacity_{message}"):
        validate(spread)
    spread.expert_parallel_comm_backend, spread.hybridep_non_blocking_expert_capacity_factor = "hybridep", 1.0
    validate(spread)


@pytest.mark.parametrize("name", ["deepep", "deepep_v1", "deepep_v2", "hybridep"])
def test_what_cannot_run_is_an_error_with_the_reason(name: Any) -> None:
    run = run_of(expert_parallel_comm_backend=name)
    start = f"^parallelism.expert_parallel_comm_backend {name} cannot run: "
    with pytest.raises(UserError, match=f"{start}it needs NVIDIA GPUs, and this run is on cpu; use reference"):
        make_dispatcher(run, CPU, 2)
    with pytest.raises(UserError, match=f"{start}there is no package deep_ep; build it from source: git clone"):
        make_dispatcher(run, GPU, 2)


def test_buffers_are_for_what_a_rank_sends_at_once() -> None:
    """Rows of a microbatch times their length, divided by the ranks that share a row."""
    run = run_of()
    expected = Sizes(3 * 64, 16, 6, 2, 2, torch.bfloat16)
    assert largest_dispatch(run, GPU, 2) == expected
    run.parallelism = Parallelism(tensor_parallel_degree=2, context_parallel_degree=2, **SPREAD)
    assert largest_dispatch(run, GPU, 4) == expected._replace(n_tokens=3 * 64 // 4)
    run.parallelism = Parallelism(pipeline_parallel_degree=2, **SPREAD)
    assert largest_dispatch(run, GPU, 4) == expected._replace(n_tokens=64)
    run.parallelism = Parallelism()
    assert largest_dispatch(run, GPU, 2) is None


def test_config_json_names_the_generation_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(expert_parallel_comm_backend="deepep")
    monkeypatch.setattr(folder, "installed", lambda name, device: {"deepep": "deepep_v2"}.get(name, name))
    told = from_dict(json.loads(config_text(run, GPU)), Trainer.Config)
    assert told.parallelism.expert_parallel_comm_backend == "deepep_v2"
    assert run.parallelism.expert_parallel_comm_backend == "deepep"
    told.parallelism.expert_parallel_comm_backend, told.training.mask = "deepep", "auto"
    assert told == run


def wired() -> list[Any]:
    group = dist.group.WORLD
    standard, reference = (dispatchers(name, CPU)(group) for name in ("standard", "reference"))
    found = [type(standard), type(reference), type(bound("deepep", group.group_name))]
    release()
    return [*found, bound("deepep", group.group_name)]


def test_what_runs_is_what_was_asked_for() -> None:
    assert run_ranks(wired, 1) == [[AllToAll, DeepEP, Reference, None]]


def test_a_run_says_how_its_tokens_travel() -> None:
    degrees = Degrees(shard=4, expert=2)
    assert describe_degrees(degrees, "reference") == "4 (shard 4, experts over 2 by reference)"
    assert describe_degrees(Degrees(shard=4), "standard") == "4 (shard 4)"
