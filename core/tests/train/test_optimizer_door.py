"""Optimizers written outside of core: the same in every layout, known to plan and estimate, saved and resumed."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from optimizers_of_a_user import Orthogonal, Signum, orthogonal
from torch import Tensor
from toy_run import toy_run, train_until

from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.record import from_json, to_json
from core.config.validate import validate
from core.nn.weights import weights as weights_of
from core.optim.adam import AdamW
from core.optim.groups import Group
from core.optim.lion import Lion
from core.optim.muon import Muon
from core.optim.optimizer import Optimizer
from core.optim.sgd import SGD
from core.parallel.layout import RankView, SingleRank
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.plan.plan import plan
from core.runtime.meta import meta_model
from core.runtime.records import read_records
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.update import train_step
from core.testing.parity import Case, alone, batches_of, build_case, full
from core.testing.ranks import run_ranks
from core.testing.toy import Toy, ToyMoE
from core.train.memory import estimate
from core.train.trainer import Trainer

CPU = torch.device("cpu")
DENSE, SPARSE = Toy.Config(vocab_size=61, n_layers=4), ToyMoE.Config(vocab_size=61, n_layers=3)
SPARSE.moe.router.n_experts = 8
LAYOUTS = {
    "fsdp2": (2, DENSE, Parallelism()),
    "tp2": (2, DENSE, Parallelism(tensor_parallel_degree=2)),
    "pp2": (2, DENSE, Parallelism(pipeline_parallel_degree=2)),
    "cp2": (2, DENSE, Parallelism(context_parallel_degree=2)),
    "ddp2": (2, SPARSE, Parallelism(data_parallel_replicate_degree=2)),
    "ep2": (2, SPARSE, Parallelism(expert_parallel_degree=2)),
    "fsdp2-tp2": (4, DENSE, Parallelism(tensor_parallel_degree=2)),
    "fsdp2-pp2": (4, DENSE, Parallelism(pipeline_parallel_degree=2)),
    "hsdp2x2": (4, SPARSE, Parallelism(data_parallel_replicate_degree=2)),
    "ep2-tp2": (4, SPARSE, Parallelism(expert_parallel_degree=2, tensor_parallel_degree=2)),
    "ep4-pp2": (8, SPARSE, Parallelism(expert_parallel_degree=4, pipeline_parallel_degree=2)),
}
FEW = ["fsdp2", "tp2", "pp2", "fsdp2-tp2", "hsdp2x2", "ep2-tp2"]
"""The layouts of every test run: each axis, and two that cut the same matrices."""
STEPS = 4
GROUPS = [
    Group(pattern="layers.0.*", frozen=True),
    Group(pattern="tok_embeddings.*", lr_factor=0.3, max_norm=0.01),
    Group(pattern="*norm.weight", betas=(0.8, 0.9), weight_decay=0.2),
]
OPTIMIZERS = [Orthogonal.Config(lr=2e-2), Muon.Config(lr=2e-2, groups=GROUPS), Lion.Config(lr=1e-3), SGD.Config(lr=1.0)]
OPTIMIZERS += [AdamW.Config(lr=2e-3, state_dtype="bfloat16"), AdamW.Config(lr=2e-3, state_dtype="8-bit")]
COMPARED = {"fsdp2": 6, "ep2": 6, "tp2": 5, "fsdp2-pp2": 5, "ep2-tp2": 5}
"""How many of the optimizers are compared in a layout; in the others the first and Muon. Eight bits are not for toys
whose rows are cut."""


class Trained(NamedTuple):
    """What a rank has of a few steps."""

    losses: list[float]
    weights: dict[str, Tensor]
    n_matrices: int


def all_trained(case: Case, optimizers: list[Optimizer.Config]) -> list[Trained]:
    """What this rank has of training with each of these optimizers."""
    layout: RankView = SingleRank(CPU) if case.world_size == 1 else ManyRanks(case.parallelism, CPU)
    return [trained(replace(case, optimizer=optimizer), layout) for optimizer in optimizers]


def trained(case: Case, layout: RankView) -> Trained:
    """The losses of a few steps, the whole weights of this rank after them, and how many matrices it is dealt."""
    parts = build_case(case, layout)
    objective = Objective(
        parts.models,
        CrossEntropy.Config().build(),
        layout=layout,
        dtype=torch.float32,
        mask="document",
        pipeline=parts.pipeline,
    )
    optimizer: Optimizer = case.optimizer.build(weights=parts.weights(), layout=layout)
    settings: dict[str, Any] = {"max_norm": 1.0, "on_nonfinite": "stop"}
    batches = batches_of(case, layout)
    losses = [
        train_step(objective, optimizer, batches, step=step, lr_factor=step / STEPS, **settings).loss
        for step in range(1, STEPS + 1)
    ]
    after = {name: full(weight.detach()) for name, weight in parts.named_parameters()}
    return Trained(losses, after, doubled(optimizer))


@torch.no_grad()
def doubled(optimizer: Optimizer) -> int:
    """How many matrices this rank gets when each is to be doubled; the slices that come back are twice those there."""
    seen = 0

    def double(x_NRC: Tensor) -> Tensor:
        nonlocal seen
        seen += len(x_NRC)
        return 2 * x_NRC

    matrices = [weight for weight in optimizer.weights.values() if weight.is_matrix]
    slices = [weight.value for weight in matrices]
    for before, after in zip(slices, optimizer.map_matrices(double, matrices, slices), strict=True):
        assert torch.equal(after, 2 * before)
    return seen


ONE_RANK: dict[type, list[Trained]] = {}


@pytest.mark.layout
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FEW else pytest.mark.matrix) for name in LAYOUTS]
)
def test_optimizers_train_the_same_in_every_layout(layout: str) -> None:
    """Also where ranks hold slices of matrices that two axes of the mesh cut, or experts whole or in copies."""
    n, model, parallelism = LAYOUTS[layout]
    case = Case(model, parallelism, n)
    if type(model) not in ONE_RANK:
        ONE_RANK[type(model)] = all_trained(alone(case), OPTIMIZERS)
    here = OPTIMIZERS[: COMPARED.get(layout, 2)]
    ranks = run_ranks(all_trained, n, case, here, timeout_s=60.0 * len(here))
    for expected, *found in zip(ONE_RANK[type(model)][: len(here)], *ranks, strict=True):
        check_equal(expected, found)


def check_equal(expected: Trained, found: list[Trained]) -> None:
    """Compare what one rank has with what each of several has."""
    assert abs(expected.losses[0] - expected.losses[-1]) > 0.1, "too little was learned to tell layouts apart"
    for here in found:
        assert here.losses == pytest.approx(expected.losses, rel=1e-5)
        for name, weight in here.weights.items():
            torch.testing.assert_close(weight, expected.weights[name], rtol=1e-4, atol=1e-4)
    dealt = [here.n_matrices for here in found]
    assert {name for here in found for name in here.weights} == expected.weights.keys()
    assert sum(dealt) == expected.n_matrices and max(dealt) < expected.n_matrices, "computed twice, or all by one rank"


def matrix_bytes(model: Any) -> int:
    """Bytes of a model's matrices inside of its blocks."""
    named = weights_of(meta_model(model))
    return sum(4 * each.value.numel() for each in named if each.value.dim() > 1 and "vocab" not in each.axes)


def test_a_plan_counts_the_state_and_what_whole_matrices_send() -> None:
    """Of two ranks each has a half of every matrix: it sends its half to the other, or sends back the other's half."""
    run = Trainer.Config(model=Toy.Config(vocab_size=64, n_layers=9), optimizer=Orthogonal.Config(lr=2e-2))
    run.training = replace(run.training, device="cpu", seq_len=16, local_batch_size=2)
    found = plan(run, world_size=2, rank=0)
    (exchanged,) = (part for part in found.traffic if part.collective == "all-to-all")
    assert exchanged.bytes == matrix_bytes(run.model) // 2 and found.optimizer_bytes == found.weights_bytes


def test_an_estimate_asks_the_optimizer() -> None:
    run = Trainer.Config(model=Toy.Config())
    for dtype in ("float32", "bfloat16"):
        training = replace(run.training, dtype=dtype)
        need = estimate(meta_model(run.model), Orthogonal.Config(lr=2e-2), run.loss, training)
        assert need.optimizer == need.weights == need.gradients


def a_run(folder: Path, optimizer: Optimizer.Config, steps: int = 4, **checkpoint: Any) -> Trainer.Config:
    run = toy_run(folder, steps=steps)
    run.optimizer = optimizer
    run.checkpoint = Checkpoint(**{"enable": True, "interval": 2, **checkpoint})
    return run


def go(text: str, leaves_at: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the run of this JSON, asked to stop in step `leaves_at`; its whole weights and the whole of their state."""
    trainer: Trainer = from_json(text, Trainer.Config, trust=["optimizers_of_a_user"]).build()
    train_until(trainer, leaves_at)
    weights = {name: full(weight.detach()).clone() for name, weight in trainer.built.named_parameters()}
    state = trainer.optimizer.state
    return weights, {f"{name}.{key}": full(each) for name in state for key, each in state[name].items()}


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (Signum.Config(lr=1e-2), "float32"),
        (Orthogonal.Config(lr=1e-2), "float32"),
        (Lion.Config(lr=1e-2), "float32"),
        (SGD.Config(lr=1e-2), "float32"),
        (AdamW.Config(lr=1e-2, state_dtype="8-bit"), "float32"),
        (AdamW.Config(lr=1e-2, state_dtype="bfloat16"), "float32"),
        (Muon.Config(lr=1e-2, state_dtype="8-bit"), "bfloat16"),
        (AdamW.Config(lr=1e-2), "bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__qualname__}-{value.state_dtype}",
)
def test_the_state_is_saved_and_resumed_bit_for_bit(tmp_path: Path, optimizer: Optimizer.Config, dtype: Any) -> None:
    runs = a_run(tmp_path / "whole", optimizer), a_run(tmp_path / "parts", optimizer)
    for run in runs:
        run.training.dtype = dtype
    whole, parts = go(to_json(runs[0])), to_json(runs[1])
    left = go(parts, leaves_at=3)
    assert not torch.equal(left[0]["output.weight"], whole[0]["output.weight"])
    for found, expected in zip(go(parts), whole, strict=True):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.layout
def test_the_state_goes_on_in_another_layout(tmp_path: Path) -> None:
    run = a_run(tmp_path, Orthogonal.Config(lr=1e-2))
    run.training.global_batch_size = 8
    again = replace(run, dump_folder=str(tmp_path / "again"))
    again.checkpoint = replace(
        run.checkpoint, initial_load_path=f"{run.dump_folder}/checkpoint/step-2", initial_load_model_only=False
    )
    run.parallelism = Parallelism(tensor_parallel_degree=2)
    expected = run_ranks(go, 2, to_json(run))[0]
    for found, other in zip(go(to_json(again)), expected, strict=True):
        assert found.keys() == other.keys()
        for name in found:
            torch.testing.assert_close(found[name], other[name], rtol=1e-4, atol=1e-4)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    go(to_json(a_run(tmp_path, Orthogonal.Config(lr=1e-2))))
    other = a_run(tmp_path, AdamW.Config(), steps=6)
    with pytest.raises(UserError, match=r"optimizer.class optimizers_of_a_user:Orthogonal -> core.optim.adam:AdamW"):
        other.build()
    other.checkpoint.allow_config_change = True
    said = r"another optimizer, momentum of each weight, and AdamW keeps exp_avg, exp_avg_sq, step: .*exclude_from_load"
    with pytest.raises(UserError, match=said):
        other.build()
    other.checkpoint.exclude_from_loading = ["optimizer"]
    trainer = other.build()
    trainer.exit.close()
    assert not trainer.optimizer.state["norm.weight"]["exp_avg"].any()


def test_records_have_the_learning_rate_of_a_companion(tmp_path: Path) -> None:
    run = a_run(tmp_path, Muon.Config(lr=1e-2, companion=AdamW.Config(lr=3e-3)))
    go(to_json(run))
    rates = [(record["lr"], record["lr_companion"]) for record in read_records(Path(str(run.dump_folder)))]
    assert rates == [pytest.approx((1e-2 * factor, 3e-3 * factor)) for factor in (0.5, 1.0, 1.0, 0.5)]


def test_settings_are_checked_with_those_that_all_optimizers_have() -> None:
    with pytest.raises(UserError) as caught:
        validate(Trainer.Config(model=Toy.Config(), optimizer=Signum.Config(lr=-1.0, beta=1.0)))
    lines = str(caught.value).splitlines()
    assert "optimizer.lr: lr -1.0 must be a finite number, not negative" in lines
    assert "optimizer.beta: beta 1.0 must be in [0, 1)" in lines


def test_whole_matrices_of_a_vector_are_refused() -> None:
    optimizer: Optimizer = Signum.Config().build(weights=weights_of(meta_model(Toy.Config())), layout=SingleRank(CPU))
    vector = optimizer.weights["norm.weight"]
    with pytest.raises(UserError, match=r"norm.weight has axes \('embed',\): it is neither a matrix"):
        optimizer.map_matrices(lambda x: x, [vector], [vector.value])


def test_the_state_is_changed_in_place_or_not_at_all() -> None:
    optimizer: Optimizer = Signum.Config().build(weights=weights_of(meta_model(Toy.Config())), layout=SingleRank(CPU))
    with pytest.raises(TypeError, match="does not support item assignment"):
        optimizer.weights["norm.weight"].state["mean"] = torch.zeros(())


def test_the_document_has_the_optimizer_that_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs/add-an-optimizer.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert inspect.getsource(Orthogonal) in code and code.endswith(inspect.getsource(orthogonal))
    exec(compile(code, "docs/add-an-optimizer.md", "exec"), {"__name__": __name__})
