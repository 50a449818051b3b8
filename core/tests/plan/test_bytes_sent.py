"""Bytes that a step sends, in every layout: counted on ranks, equal to the least that the layout needs, worked out here
by hand, and equal to what a plan says. docs/layouts.md has the table.

Letters: W bytes of weights, n ranks; a ring's all-gather and reduce-scatter send (n - 1) / n of the whole.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.comm.all_to_all import AllToAll
from core.data.packing import Batch
from core.nn.balance import force_balance, routers
from core.nn.decoder import Decoder
from core.parallel.data import HAS_MESH_PER_WEIGHT
from core.parallel.layout import Wrapping
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.plan.fake_step import group_axes, run_fake_step
from core.plan.segments import total
from core.plan.traffic import message
from core.runtime.meta import meta_model
from core.step.assemble import assemble
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.settings import Training
from core.step.update import train_step
from core.testing.ranks import run_ranks
from core.testing.toy import Toy, ToyMoE
from core.train.trainer import Trainer

CPU = torch.device("cpu")
ROWS, LENGTH, FLOAT = 2, 8, 4
DENSE, SPARSE = Toy.Config(), ToyMoE.Config(n_layers=3)
SPARSE.moe.router.n_experts = 8  # FSDP would pad what it cannot cut into equal pieces
SUMS = 4 * 8
"""Sums over all ranks of a float each, in double precision: valid tokens, two losses, gradient norm."""
Sent = dict[tuple[str, str], float]


def weights(model: Decoder.Config, part: str = "") -> int:
    """W of the weights whose names have `part` in them."""
    return FLOAT * sum(w.numel() for name, w in meta_model(model).named_parameters() if part in name)


def ends(model: Decoder.Config) -> int:
    """W of what is gathered once: norm and head for forward and backward, the embedding for forward alone."""
    return weights(model, "output.") + weights(model, "tok_embeddings.") + FLOAT * model.dim


def fsdp(w: float, n: int, once: float = 0, axis: str = "shard") -> Sent:
    """Weights are gathered for forward and for backward, those of `once` at once; gradients are scattered."""
    return {(axis, "all-gather"): (2 * w - once) * (n - 1) / n, (axis, "reduce-scatter"): w * (n - 1) / n}


def tensor(model: Decoder.Config, rows: int) -> tuple[float, float, float]:
    """All-gather, reduce-scatter and all-reduce of two tensor ranks: tokens at the doors of embedding, attentions,
    networks and head, there and back; the loss of each token and its gradient; the largest logit and the sum of the
    exponentials for all ranks; gradients of norms, which are copied."""
    token = rows * LENGTH * FLOAT / 2
    doors = 2 * model.n_layers + 1
    moved = 2 * doors * token * model.dim + token
    return moved, moved, 4 * token


def add(*parts: Sent) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for part in parts:
        found.update(part)
    return found


class Layout(NamedTuple):
    """A layout, and what its first rank sends at the least."""

    n: int
    settings: Parallelism
    expected: Counter[tuple[str, str]]
    model: Decoder.Config = DENSE


def norms(model: Any) -> int:
    return FLOAT * (model.n_layers * 2 * (model.dim + model.attention.head_dim) + model.dim)


W = weights(DENSE)
KEYS = ROWS * LENGTH // 2 * DENSE.attention.n_kv_heads * DENSE.attention.head_dim * FLOAT
"""One side of the keys of half a batch, as K and V are."""
QUERIES = KEYS // DENSE.attention.n_kv_heads * DENSE.attention.n_heads
CHOICES = ROWS * LENGTH * SPARSE.moe.router.top_k
TRAVEL = 2 * (8 * SPARSE.moe.router.n_experts + FLOAT * CHOICES * (4 * SPARSE.dim + 2)) / 2
"""In two layers, of counts, of rows and answers and their gradients, and of weights, the half that leaves."""
COUNTS = 2 * SPARSE.moe.router.n_experts * 8
DENSE_OF_SPARSE = weights(SPARSE) - weights(SPARSE, ".experts.")
GATHERED, SCATTERED, REDUCED = tensor(DENSE, ROWS)
N_BLOCKS = DENSE.n_layers

LAYOUTS = {
    "FSDP 2": Layout(2, Parallelism(), add(fsdp(W, 2, ends(DENSE)), {("shard", "all-reduce"): SUMS})),
    "HSDP 2 x 2": Layout(
        4,
        Parallelism(data_parallel_replicate_degree=2),
        add(fsdp(W, 2, ends(DENSE)), {("replicate", "all-reduce"): W / 2, ("all", "all-reduce"): SUMS * 1.5}),
    ),
    "DDP 2": Layout(2, Parallelism(data_parallel_replicate_degree=2), add({("replicate", "all-reduce"): W + SUMS})),
    "TP 2": Layout(
        2,
        Parallelism(tensor_parallel_degree=2),
        add(
            {
                ("tensor", "all-gather"): GATHERED,
                ("tensor", "reduce-scatter"): SCATTERED,
                ("tensor", "all-reduce"): REDUCED + norms(DENSE) + SUMS,
            }
        ),
    ),
    "CP 2": Layout(
        2,
        Parallelism(context_parallel_degree=2),
        add(
            fsdp(W, 2, ends(DENSE), "shard/context"),
            {
                ("shard/context", "all-gather"): N_BLOCKS * 2 * KEYS,
                ("shard/context", "reduce-scatter"): N_BLOCKS * 2 * KEYS,
                ("shard/context", "all-reduce"): SUMS,
            },
        ),
    ),
    "CP 2, all-to-all": Layout(
        2,
        Parallelism(context_parallel_degree=2, context_parallel_rotate_method="alltoall"),
        add(
            fsdp(W, 2, ends(DENSE), "shard/context"),
            {
                ("shard/context", "all-to-all"): N_BLOCKS * 2 * (2 * QUERIES + 2 * KEYS) / 2,
                ("shard/context", "all-reduce"): SUMS,
            },
        ),
    ),
    "PP 2": Layout(
        2,
        Parallelism(pipeline_parallel_degree=2),
        add({("pipeline", "send"): ROWS * LENGTH * DENSE.dim * FLOAT, ("pipeline", "all-reduce"): SUMS}),
    ),
    "EP 2": Layout(
        2,
        Parallelism(expert_parallel_degree=2),
        add(
            fsdp(DENSE_OF_SPARSE, 2, ends(SPARSE), "shard/expert"),
            {("shard/expert", "all-to-all"): TRAVEL, ("shard/expert", "all-reduce"): COUNTS + SUMS},
        ),
        SPARSE,
    ),
    "FSDP 2 x EP 2": Layout(
        4,
        Parallelism(expert_parallel_degree=2),
        add(
            fsdp(DENSE_OF_SPARSE, 4, ends(SPARSE)),
            fsdp(weights(SPARSE, ".experts.") / 2, 2, axis="expert shard"),
            {("expert", "all-to-all"): TRAVEL, ("shard", "all-reduce"): 1.5 * (COUNTS + SUMS)},
        ),
        SPARSE,
    ),
    "FSDP 2 x TP 2": Layout(
        4,
        Parallelism(tensor_parallel_degree=2),
        add(
            fsdp((W + norms(DENSE)) / 2, 2, (ends(DENSE) + FLOAT * DENSE.dim) / 2),
            {
                ("tensor", "all-gather"): GATHERED,
                ("tensor", "reduce-scatter"): SCATTERED,
                ("tensor", "all-reduce"): REDUCED + norms(DENSE),
                ("all", "all-reduce"): 1.5 * SUMS,
            },
        ),
    ),
}


def run_of(layout: Layout) -> Trainer.Config:
    return Trainer.Config(
        model=layout.model,
        parallelism=layout.settings,
        training=Training(device="cpu", seq_len=LENGTH, local_batch_size=ROWS),
        activation_checkpoint=ActivationCheckpoint.Config(mode="none"),
    )


class Heard(TorchDispatchMode):
    """The bytes that this rank sends, by axis and collective."""

    def __init__(self, axes: Any) -> None:
        super().__init__()
        self.axes, self.sent = axes, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (found := message(func, args, out)) is not None:
            self.sent[self.axes[found.group.group_name], found.collective] += found.n_bytes
        return out


def counted(names: list[str]) -> list[Counter[tuple[str, str]]]:
    """What this rank sends in the second step of each layout."""
    return [step_of(run_of(LAYOUTS[name])) for name in names]


def step_of(run: Trainer.Config) -> Counter[tuple[str, str]]:
    layout = ManyRanks(run.parallelism, CPU)
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
        n_microbatches=ROWS,
    )
    experts = any(routers(model) for model in parts.models)
    for model in parts.models:
        if experts:
            force_balance(model)
    optimizer = run.optimizer.build(weights=parts.weights(), layout=layout)
    objective = Objective(
        parts.models,
        CrossEntropy.Config().build(),
        layout=layout,
        dtype=torch.float32,
        mask="causal",
        pipeline=parts.pipeline,
    )
    tokens_BL = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % run.model.vocab_size
    batch = Batch(tokens_BL, tokens_BL, torch.arange(LENGTH).expand_as(tokens_BL), tokens_BL * 0)
    settings: dict[str, Any] = {"lr_factor": 1.0, "max_norm": 1.0, "on_nonfinite": "stop"}
    train_step(objective, optimizer, [batch], step=1, **settings)
    with Heard(group_axes(layout, experts=experts)) as heard:
        train_step(objective, optimizer, [batch], step=2, **settings)
    return heard.sent


if not HAS_MESH_PER_WEIGHT:
    LAYOUTS = {name: each for name, each in LAYOUTS.items() if each.settings.expert_parallel_degree == 1}


@pytest.fixture(scope="module")
def on_ranks() -> dict[str, Counter[tuple[str, str]]]:
    """What the first rank of every layout sends."""
    found = {}
    for n in (2, 4):
        names = [name for name, layout in LAYOUTS.items() if layout.n == n]
        found |= dict(zip(names, run_ranks(counted, n, names, timeout_s=120)[0], strict=True))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_sends_the_least_that_its_layout_needs(on_ranks: Any, name: str):
    assert on_ranks[name] == LAYOUTS[name].expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_says_what_is_sent(name: str):
    found = run_fake_step(run_of(LAYOUTS[name]), world_size=LAYOUTS[name].n, rank=0, device=CPU)
    assert total(found.segments).sent == LAYOUTS[name].expected
