"""A rehearsed step against the step itself on four ranks, against sums by hand, and against a run of all blocks."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.meter import Meter
from core.comm.all_to_all import AllToAll
from core.data.packing import Batch
from core.nn.balance import force_balance, routers
from core.nn.decoder import Block, Decoder
from core.nn.weights import training_flops_per_token
from core.optim.adam import AdamW
from core.optim.muon import Muon
from core.optim.optimizer import Optimizer
from core.optim.weight import local_bytes
from core.parallel.data import HAS_MESH_PER_WEIGHT
from core.parallel.layout import Wrapping
from core.parallel.settings import Parallelism
from core.plan import fake_step
from core.plan.fake_step import run_fake_step
from core.plan.sample_blocks import RestingBytes, stand_ins
from core.plan.segments import total
from core.runtime.meta import meta_model
from core.step.assemble import assemble, make_layout
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.settings import Training
from core.step.update import train_step
from core.testing.ranks import run_ranks
from core.testing.toy import Toy, ToyMoE
from core.train.trainer import Trainer

CPU = torch.device("cpu")


class Mixed(ToyMoE):
    """Dense and sparse blocks, and windows in every third block."""

    @dataclass(kw_only=True, slots=True)
    class Config(ToyMoE.Config):
        n_dense: int = 3
        """Blocks at the start that have no experts."""

    config: Config

    def block(self, i: int) -> Block:
        c = self.config
        block = self.make_block(
            c.attention,
            feed_forward=c.feed_forward if i < c.n_dense else None,
            moe=c.moe if i >= c.n_dense else None,
        )
        block.attention.kernel = type(block.attention.kernel)(None if i % 3 else 4)
        return block


def run_of(
    model: Any,
    parallelism: Parallelism | None = None,
    *,
    mode: str = "selective",
    microbatches: int = 1,
    optimizer: Optimizer.Config | None = None,
    **rest: Any,
) -> Trainer.Config:
    parallelism = parallelism or Parallelism()
    training = {"device": "cpu", "seq_len": 32, "local_batch_size": 2, **rest}
    rows = training["local_batch_size"] * parallelism.degrees(4).data * microbatches
    return Trainer.Config(
        model=model,
        parallelism=parallelism,
        optimizer=optimizer or AdamW.Config(),
        training=Training(**training, global_batch_size=rows if microbatches > 1 else -1),
        activation_checkpoint=ActivationCheckpoint.Config(mode=mode),
    )


def measured(run: Trainer.Config) -> tuple[int, RestingBytes]:
    """What a rank has, and the most that its third step adds at once."""
    layout, training = make_layout(run.parallelism, CPU), run.training
    n_rows = training.rows_per_step(layout.degrees.data) // layout.degrees.data
    wrapping = Wrapping(
        compute_dtype=torch.float32,
        checkpoint=run.activation_checkpoint.build(folder=Path()).apply,
        dispatcher=AllToAll,
    )
    parts = assemble(
        run.model,
        layout,
        wrapping,
        dtype=torch.float32,
        seed=0,
        n_microbatches=n_rows // run.parallelism.pipeline_parallel_microbatch_size,
    )
    for model in parts.models:
        if routers(model):
            force_balance(model)
    optimizer = run.optimizer.build(weights=parts.weights(), layout=layout)
    objective = Objective(
        parts.models,
        CrossEntropy.Config().build(),
        layout=layout,
        dtype=torch.float32,
        mask=training.mask,
        pipeline=parts.pipeline,
    )
    tokens_BL = torch.randint(run.model.vocab_size, (training.local_batch_size, training.seq_len))
    batch = Batch(tokens_BL, tokens_BL, torch.arange(training.seq_len).expand_as(tokens_BL), tokens_BL * 0)
    batches = [batch] * (n_rows // training.local_batch_size)
    settings: dict[str, Any] = {"lr_factor": 1.0, "max_norm": 1.0, "on_nonfinite": "stop"}
    for step in (1, 2):
        train_step(objective, optimizer, batches, step=step, **settings)
    optimizer.zero_grad()
    gc.collect()
    gc.disable()  # as in a run
    with Meter() as meter:
        train_step(objective, optimizer, batches, step=3, **settings)
        peak = meter.peak
    weights = dict(parts.named_parameters())
    return peak, RestingBytes(
        n_weights=sum(local_bytes(weight) // 4 for weight in weights.values()),
        weights=sum(map(local_bytes, weights.values())),
        gradients=sum(local_bytes(weight.grad) for weight in weights.values()),
        optimizer=sum(local_bytes(value) for state in optimizer.state.values() for value in state.values()),
        buffers=sum(local_bytes(buffer) for model in parts.models for buffer in model.buffers()),
    )


WIDE = {"dim": 64, "vocab_size": 250}
CASES = {
    "FSDP 2 x TP 2": run_of(Toy.Config(n_layers=7, **WIDE), Parallelism(tensor_parallel_degree=2)),
    "FSDP 2 x TP 2, Muon": run_of(
        Toy.Config(n_layers=3, **WIDE), Parallelism(tensor_parallel_degree=2), optimizer=Muon.Config()
    ),
    "FSDP 2 x EP 2, Muon": run_of(
        ToyMoE.Config(n_layers=3, **WIDE), Parallelism(expert_parallel_degree=2), optimizer=Muon.Config()
    ),
    "FSDP 2 x EP 2": run_of(
        ToyMoE.Config(n_layers=3, **WIDE), Parallelism(expert_parallel_degree=2), mode="full", microbatches=5
    ),
    "FSDP 2 x PP 2": run_of(
        Toy.Config(n_layers=6, **WIDE), Parallelism(pipeline_parallel_degree=2), mode="none", local_batch_size=7
    ),
    "PP 4, in a V": run_of(
        Toy.Config(n_layers=10, **WIDE),
        Parallelism(pipeline_parallel_degree=4, pipeline_parallel_schedule="DualPipeV"),
        mode="full",
        local_batch_size=9,
    ),
    "FSDP 4, updates in backward": run_of(
        Toy.Config(n_layers=7, **WIDE), mode="full", optimizer=AdamW.Config(in_backward=True)
    ),
}


if not HAS_MESH_PER_WEIGHT:
    CASES = {name: run for name, run in CASES.items() if run.parallelism.expert_parallel_degree == 1}


def all_measured() -> dict[str, tuple[int, RestingBytes]]:
    return {name: measured(run) for name, run in CASES.items()}


@pytest.fixture(scope="module")
def on_four_ranks() -> list[dict[str, tuple[int, RestingBytes]]]:
    """What each of four ranks has, and what its step adds, in every case."""
    return run_ranks(all_measured, 4, timeout_s=240)


def test_attention_is_that_of_the_device_that_is_planned_for():
    """Documents cost a GPU a table of queries by keys of each row, and a CPU no more than where they start."""

    def cost(device: str) -> int:
        runs = [run_of(Toy.Config(max_seq_len=256), mask=mask, seq_len=256) for mask in ("document", "causal")]
        found = [run_fake_step(run, world_size=1, rank=0, device=torch.device(device)) for run in runs]
        own, plain = (total(record.segments).peak_activations for record in found)
        return own - plain

    table = 2 * 256 * 256
    assert cost("cuda") >= table > 8 * cost("cpu")


@pytest.mark.parametrize("case", CASES)
def test_equals_a_real_run_on_four_ranks(case: str, on_four_ranks: list[dict[str, tuple[int, RestingBytes]]]):
    run, real = CASES[case], [found[case] for found in on_four_ranks]
    stages = run.parallelism.pipeline_parallel_degree > 1  # without, ranks differ in uneven pieces alone
    for rank in (0, 3) if stages else (3,):
        peak, has = real[rank]
        found = run_fake_step(run, world_size=4, rank=rank, device=CPU)
        assert found.stored == has and (has.gradients == 0) == run.optimizer.in_backward
        assert total(found.segments).peak == pytest.approx(peak, rel=0.1)


OPTIMIZERS = [
    AdamW.Config(state_dtype="8-bit", ema_decay=0.9),
    Muon.Config(state_dtype="bfloat16"),
    AdamW.Config(in_backward=True),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["8-bit", "bfloat16", "in_backward"])
def test_states_and_updates_are_those_of_a_real_run(optimizer: Optimizer.Config):
    """States in few bits to the byte, and the most of a step with what it decodes, and without gradients."""
    run = run_of(Toy.Config(n_layers=3, **WIDE), mode="full", optimizer=optimizer)
    peak, has = measured(run)
    found = run_fake_step(run, world_size=1, rank=0, device=CPU)
    assert found.stored == has and (has.gradients == 0) == optimizer.in_backward
    assert total(found.segments).peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_equal_matrices_are_counted_as_often_as_they_are_there(monkeypatch: pytest.MonkeyPatch, n_ranks: int):
    run = run_of(ToyMoE.Config(n_layers=4, **WIDE), optimizer=Muon.Config())
    few = run_fake_step(run, world_size=n_ranks, rank=0, device=CPU)
    monkeypatch.setattr("core.plan.shared_matrices.recorded_once", lambda function, _: function)
    every = run_fake_step(run, world_size=n_ranks, rank=0, device=CPU)
    assert few.segments == every.segments


@pytest.mark.parametrize(("model", "microbatches"), [(Mixed.Config(n_layers=16), 1), (Toy.Config(n_layers=7), 6)])
def test_few_blocks_stand_for_all(monkeypatch: pytest.MonkeyPatch, model: Decoder.Config, microbatches: int):
    degree = 2 if isinstance(model, Mixed.Config) and HAS_MESH_PER_WEIGHT else 1
    run = run_of(model, Parallelism(expert_parallel_degree=degree), microbatches=microbatches)
    few = run_fake_step(run, world_size=4, rank=3, device=CPU)
    assert set(stand_ins(meta_model(model), run.activation_checkpoint).values()) < set(range(model.n_layers))
    monkeypatch.setattr("core.plan.sample_blocks.stand_ins", lambda model, _: {int(i): int(i) for i in model.layers})
    monkeypatch.setattr(fake_step, "microbatches_of_interest", lambda order: {action.microbatch for action in order})
    every = run_fake_step(run, world_size=4, rank=3, device=CPU)
    assert few.stored == every.stored
    assert total(few.segments) == total(every.segments)
    assert len(few.segments) == len(every.segments)


def test_blocks_are_alike_where_they_and_their_neighbours_are():
    activation_checkpoint = ActivationCheckpoint.Config()
    assert stand_ins(meta_model(Toy.Config(n_layers=8)), activation_checkpoint) == {
        0: 0,
        1: 1,
        2: 2,
        3: 2,
        4: 2,
        5: 2,
        6: 6,
        7: 7,
    }
    one = ActivationCheckpoint.Config(per_op_sac_force_recompute_mm_shapes_by_fqns=["layers.5.attention.wq"])
    assert set(stand_ins(meta_model(Toy.Config(n_layers=16)), one).values()) == {0, 1, 2, 3, 4, 5, 6, 7, 14, 15}


def test_repeats_that_would_get_other_neighbours_are_all_kept():
    class Odd(Mixed):
        @dataclass(kw_only=True, slots=True)
        class Config(Mixed.Config):
            pass

        def block(self, i: int) -> Block:
            block = self.make_block(self.config.attention, feed_forward=self.config.feed_forward)
            block.attention.kernel = type(block.attention.kernel)(3 if i in (3, 11) else None)
            return block

    stand_in = stand_ins(meta_model(Odd.Config(n_layers=20)), ActivationCheckpoint.Config())
    assert stand_in == {i: i for i in range(20)}


@pytest.mark.parametrize("mode", ["none", "full"])
def test_flops_are_those_worked_out_by_hand(mode: str):
    run = run_of(Toy.Config(n_layers=6), mode=mode)
    found = total(run_fake_step(run, world_size=1, rank=0, device=CPU).segments)
    once = training_flops_per_token(meta_model(run.model), run.training.seq_len)
    head = 2 * run.model.dim * run.model.vocab_size
    again = (once.matmul // 3 - head + once.attention // 3) if mode == "full" else 0
    scores = once.attention // 6  # which the backward of attention computes once more
    assert found.flops == 2 * run.training.seq_len * (once.total + scores + again)
    assert not found.sent


def test_modes_keep_less_and_less():
    peaks = [
        total(run_fake_step(run_of(Toy.Config(n_layers=9), mode=mode), world_size=1, rank=0, device=CPU).segments).peak
        for mode in ("none", "selective", "full")
    ]
    assert peaks[0] > peaks[1] > peaks[2]


def test_gradients_and_activations_are_told_apart():
    run = run_of(Toy.Config(n_layers=9), mode="full")
    found = run_fake_step(run, world_size=1, rank=0, device=CPU)
    step = total(found.segments)
    assert sum(segment.gradients for segment in found.segments) == found.stored.gradients == found.stored.weights
    assert step.peak_activations < step.peak <= step.peak_activations + found.stored.gradients


def test_the_update_of_all_weights_is_counted():
    """What the plain implementations hold for all weights at once."""
    risen = {}
    for implementation in ("fused", "foreach"):
        run = run_of(Toy.Config(n_layers=9))
        run.optimizer.implementation = implementation
        found = run_fake_step(run, world_size=1, rank=0, device=CPU)
        (update,) = (segment for segment in found.segments if segment.what == "update")
        risen[implementation] = update.rise
    assert risen["foreach"] > found.stored.weights * 0.9 > 10 * risen["fused"]


def test_pipeline_with_tokens_that_travel():
    """Bytes that a first and a last stage send: the residual stream of each row, in the type of products."""
    run = run_of(Toy.Config(n_layers=6), Parallelism(pipeline_parallel_degree=2), local_batch_size=8)
    for rank in (0, 1):
        found = total(run_fake_step(run, world_size=2, rank=rank, device=torch.device("cuda")).segments)
        assert found.sent["pipeline", "send"] == 8 * 32 * 16 * 2
        assert found.calls["pipeline", "send"] == 8
