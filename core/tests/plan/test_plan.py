"""A plan as it is read: what it says, what it takes for granted, and everything that is wrong at once."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed as dist

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.config.errors import UserError
from core.nn.weights import parameter_count
from core.optim.adam import AdamW
from core.parallel.settings import Parallelism
from core.plan.plan import Plan, plan
from core.runtime.meta import meta_model
from core.step.settings import Compile, Debug, Training
from core.testing.toy import Toy, ToyMoE
from core.train.trainer import Trainer


def run_of(model: Any = None, **parts: Any) -> Trainer.Config:
    training = Training(seq_len=32, local_batch_size=2)
    return Trainer.Config(**{"recipe": "toy", "model": model or Toy.Config(n_layers=4), "training": training, **parts})


def lines_of(found: Plan) -> dict[str, list[str]]:
    """The words of each line behind its first."""
    return {words[0]: words[1:] for line in str(found).splitlines() if (words := line.split())}


@pytest.fixture(scope="module")
def plain() -> Plan:
    """The plan of a run that takes nothing for granted."""
    return plan(run_of(), world_size=2, rank=1)


def test_says_what_was_asked():
    found = plan(run_of(parallelism=Parallelism(tensor_parallel_degree=2)), world_size=8, rank=5)
    lines = lines_of(found)
    assert str(found).startswith("toy: rank 5 of 8 in one step\n")
    assert lines["mesh"] == "8 (shard 4 x tensor 2)".split()
    assert lines["step"] == "8 rows of 32 tokens; here 1 microbatch of 2".split()
    assert lines["types"] == "weights float32, compute bfloat16".split()
    assert (
        lines["model"][0] == f"{found.model_parameters:,}" == f"{parameter_count(meta_model(Toy.Config(n_layers=4))):,}"
    )
    assert lines["weights"] == [f"{found.weights_bytes / 2**20:.3f}"]
    assert found.weights_bytes == found.gradients_bytes == 4 * found.parameters
    assert found.optimizer_bytes >= 2 * found.weights_bytes
    kept = found.weights_bytes + found.optimizer_bytes + found.inputs_bytes
    assert kept + found.activations_bytes <= found.peak_bytes <= kept + found.activations_bytes + found.gradients_bytes
    assert {(part.axis, part.collective) for part in found.traffic} >= {
        ("shard", "all-gather"),
        ("shard", "reduce-scatter"),
        ("tensor", "all-gather"),
        ("tensor", "reduce-scatter"),
    }
    assert json.loads(json.dumps(asdict(found)))["traffic"][0].keys() == {"axis", "collective", "calls", "bytes"}


def test_the_ranks_hold_the_model_between_them():
    run = run_of(
        ToyMoE.Config(n_layers=4),
        parallelism=Parallelism(pipeline_parallel_degree=2, expert_parallel_degree=2),
        training=Training(seq_len=32, local_batch_size=2),
    )
    plans = [plan(run, world_size=4, rank=rank) for rank in range(4)]
    assert sum(found.parameters for found in plans) == plans[0].model_parameters
    assert [found.stages for found in plans] == [["0-1"]] * 2 + [["2-3"]] * 2
    assert {found.microbatches for found in plans} == {2}


def test_without_a_number_of_ranks_the_degrees_say_it():
    assert plan(run_of(), world_size=None, rank=0).world_size == 1
    settings = Parallelism(tensor_parallel_degree=2, data_parallel_replicate_degree=3)
    assert plan(run_of(parallelism=settings), world_size=None, rank=0).mesh["replicate"] == 3


def test_types_are_those_of_the_device_of_the_run():
    assert plan(run_of(training=Training(seq_len=32)), world_size=2, rank=0).compute_dtype == "bfloat16"
    assert plan(run_of(training=Training(seq_len=32, device="cpu")), world_size=2, rank=0).compute_dtype == "float32"


@pytest.mark.parametrize(
    ("parts", "note"),
    [
        ({"compile": Compile(enable=True)}, "torch.compile is not rehearsed"),
        (
            {
                "compile": Compile(enable=True),
                "activation_checkpoint": ActivationCheckpoint.Config(mode="memory_budget"),
            },
            "planned is mode none",
        ),
        (
            {
                "compile": Compile(enable=True),
                "parallelism": Parallelism(enable_async_tensor_parallel=True, tensor_parallel_degree=2),
                "activation_checkpoint": ActivationCheckpoint.Config(mode="none"),
            },
            "torch.compile is not rehearsed",
        ),
        ({"model": ToyMoE.Config()}, "experts get equally many rows"),
        ({"parallelism": Parallelism(cpu_offload=True)}, "lie in the host's memory"),
    ],
)
def test_says_what_it_takes_for_granted(plain: Plan, parts: dict[str, Any], note: str):
    found = plan(run_of(**parts), world_size=2, rank=1)
    assert any(note in line for line in found.notes)
    assert found.peak_bytes > 0
    assert not any(note in line for line in plain.notes)


def test_flex_attention_is_planned_though_a_cpu_cannot_train_it():
    model = Toy.Config()
    model.attention.backend = "flex"
    found = plan(run_of(model), world_size=2, rank=0)
    assert "flex attention is planned as sdpa on a CPU, tile by tile" in found.notes
    with pytest.raises(UserError, match="cannot train on a cpu"):
        plan(run_of(model, training=Training(seq_len=32, device="cpu")), world_size=2, rank=0)


def test_everything_that_is_wrong_is_said_at_once():
    run = run_of(
        parallelism=Parallelism(tensor_parallel_degree=3, expert_parallel_degree=5),
        activation_checkpoint=ActivationCheckpoint.Config(mode="full", force_recompute=["attention.w9"]),
        optimizer=AdamW.Config(lr=-1.0),
        debug=Debug(moe_force_load_balance=True),
    )
    with pytest.raises(UserError) as error:
        plan(run, world_size=7, rank=7)
    for words in (
        "rank 7 is none of 7 ranks: use 0 to 6",
        "tensor_parallel_degree 3 makes 3 ranks, and 7 started",
        "must divide n_heads 4",
        "must divide n_kv_heads 2",
        "seq_len 32 must be a multiple of 3",
        "the model has no experts",
        "no block has attention.w9",
        "optimizer.lr: lr -1.0",
        "moe_force_load_balance is set, and the model has no router",
    ):
        assert words in str(error.value), words


def test_degrees_that_make_no_sense_are_said_with_all_else():
    run = run_of(parallelism=Parallelism(tensor_parallel_degree=0), optimizer=AdamW.Config(lr=-1.0))
    with pytest.raises(UserError) as error:
        plan(run, world_size=None, rank=0)
    assert len(str(error.value).splitlines()) == 2


def test_no_device_is_touched_and_no_group_is_left():
    plan(run_of(parallelism=Parallelism(tensor_parallel_degree=2)), world_size=4, rank=3)
    assert not dist.is_initialized()
