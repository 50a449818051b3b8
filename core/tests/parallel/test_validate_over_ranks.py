"""Validation over ranks has the loss of one rank, and leaves training as it was; so have sources of a step's rows."""

import math
from typing import Any

import pytest
import torch
from layout_cases import CP, EP2, FSDP2, FSDP2_TP2, FSDP4, HSDP4, TP2, dense, sparse
from torch.nn import functional as F

from core.data.packing import IGNORE, Batch
from core.nn.balance import routers
from core.nn.decoder import Decoder
from core.nn.kernel import Positions
from core.optim.adam import AdamW
from core.parallel.layout import RankView, SingleRank
from core.parallel.many_ranks import ManyRanks
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.source_losses import SourceLosses, StepSources
from core.step.update import train_step
from core.testing.layout_suite import SCHEDULES, LayoutCase, degrees
from core.testing.parity import Case, batches_of, build_case, drawn_batch
from core.testing.ranks import run_ranks
from core.train.validate import Validator

CPU = torch.device("cpu")
HELD_OUT = 13
"""Rows of validation: no multiple of anything, and less than two steps."""


class Rows:
    """The held-out text."""

    n_rows, in_order, parts_of_rows = HELD_OUT, False, {}

    def __init__(self, model: Decoder.Config) -> None:
        self.all = drawn_batch(model, HELD_OUT, 16, empty_rows=2)

    def read(self, first: int, count: int) -> Batch:
        assert 0 <= first and first + count <= HELD_OUT
        return self.all.rows(first, first + count)


def train_and_validate(case: Case, steps: int, first: bool) -> dict[str, Any]:
    """Validate, if so `first`; train; validate; train again. What is validated are means of the weights over the steps
    so far, of which there is one: the weights are put aside and come back."""
    layout: RankView = (
        SingleRank(torch.device("cpu")) if case.world_size == 1 else ManyRanks(case.parallelism, torch.device("cpu"))
    )
    parts = build_case(case, layout)
    objective = Objective(
        parts.models,
        CrossEntropy.Config().build(),
        layout=layout,
        dtype=torch.float32,
        mask="document",
        pipeline=parts.pipeline,
    )
    local = case.n_rows // layout.degrees.data if case.local_batch_size == -1 else case.local_batch_size
    optimizer = AdamW.Config(lr=1e-2, ema_decay=0.5).build(weights=parts.weights(), layout=layout)
    validator = Validator.Config(enable=True, steps=steps, use_ema=True).build(
        loaders={"validation": Rows(case.model)},
        objective=objective,
        optimizer=optimizer,
        text_bytes=bytes_of,
        rows_per_step=case.n_rows,
        local_batch_size=local,
    )

    n_data = layout.degrees.data
    starts = range(layout.data_rank * local, case.n_rows, local * n_data)
    sources = StepSources([source_of(torch.arange(first, first + local)) for first in starts], SourceLosses("abc"))
    settings: dict[str, Any] = {"step": 1, "lr_factor": 1.0, "max_norm": 1.0, "on_nonfinite": "stop"}

    def train() -> list[float]:
        info = train_step(objective, optimizer, batches_of(case, layout), sources=sources, **settings)
        return [info.loss, info.grad_norm]

    def counts() -> list[list[int]]:
        return [router.tokens_E.tolist() for model in parts.models for router in routers(model).values()]

    measured = [validator.measure(lambda: False)] if first else []
    trained = train()
    by_source = sources.losses.take(layout)
    counted = counts()
    measured.append(validator.measure(lambda: False))
    assert counts() == counted, "validation counts as training"
    assert all(model.training for model in parts.models)
    trained += train()
    assert validator.measure(lambda: True) is None and all(model.training for model in parts.models)
    losses, bits, _ = zip(*measured, strict=True)
    return {"losses": losses, "bits": bits, "trained": trained, "sources": by_source}


def source_of(rows: torch.Tensor) -> torch.Tensor:
    """The source, of three, of rows with these numbers; the last has one row alone."""
    return torch.where(rows == 5, 2, rows % 2)


def bytes_of(batch: Batch) -> float:
    """Text of which token n has n bytes."""
    return float(batch.labels_BL[batch.labels_BL != IGNORE].sum())


def loss_of_all(case: Case, n_rows: int) -> float:
    """Nats per valid token at the start, by the plainest means."""
    return loss_at_start(case, Rows(case.model).read(0, n_rows))


def loss_at_start(case: Case, batch: Batch) -> float:
    (model,) = build_case(case, SingleRank(CPU)).models
    logits_BLV = model.eval()(batch.tokens_BL, Positions(batch.positions_BL, batch.documents_BL))
    return F.cross_entropy(logits_BLV.flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORE).item()


LAYOUTS = {
    "fsdp2": FSDP2.case(dense(), "none"),
    "fsdp2-accumulate": FSDP2.case(dense(), "none", local_batch_size=1),
    "hsdp2x2": HSDP4.case(dense(), "none"),
    "tp2": TP2.case(dense(), "none"),
    "fsdp2-tp2": FSDP2_TP2.case(dense(), "none"),
    "cp2": CP["cp2"].case(dense(), "none"),
    "ep2": EP2.case(sparse(), "full"),
    "fsdp2-pp2": LayoutCase(4, degrees(pipeline=2)).case(dense(n_layers=4), "none"),
    **{
        f"pp2-{schedule}": LayoutCase(2, degrees(pipeline=2, schedule=schedule)).case(sparse(n_layers=4), "none")
        for schedule in SCHEDULES
    },
    "fsdp4": FSDP4.case(dense(), "none"),
}
FEW = ["fsdp2-accumulate", "fsdp4", "fsdp2-tp2", "cp2", "pp2-1F1B", "pp2-DualPipeV"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.matrix) for name in LAYOUTS]
)
def test_validation_over_ranks(name: str) -> None:
    case = LAYOUTS[name]
    alone = Case(case.model)
    expected = train_and_validate(alone, -1, True)
    assert expected["losses"][0] == pytest.approx(loss_of_all(alone, HELD_OUT), rel=1e-6)
    labels = Rows(case.model).all.labels_BL
    valid = labels[labels != IGNORE]
    nats = expected["losses"][0] * len(valid)
    assert expected["bits"][0] == pytest.approx(nats / math.log(2) / sum(valid.tolist()), rel=1e-9)
    assert expected["losses"][0] != pytest.approx(expected["losses"][1], rel=1e-4), "training changed nothing"
    (step,) = batches_of(alone, SingleRank(CPU))
    places = source_of(torch.arange(alone.n_rows))
    by_source = {name: step.map(lambda part, n=number: part[places == n]) for number, name in enumerate("abc")}
    nats_of = {name: loss_at_start(alone, rows) for name, rows in by_source.items()}
    assert expected["sources"] == pytest.approx(nats_of, rel=1e-5)
    for found in run_ranks(train_and_validate, case.world_size, case, -1, True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["bits"] == pytest.approx(expected["bits"], rel=1e-5)
        assert found["sources"] == pytest.approx(nats_of, rel=1e-5)
        assert found["trained"] == pytest.approx(expected["trained"], rel=1e-5)


def test_validation_can_stop_early_in_the_text() -> None:
    """One batch of validation is as many rows as a step."""
    case = Case(dense())
    expected = loss_of_all(case, 8)
    assert train_and_validate(case, 1, True)["losses"][0] == pytest.approx(expected, rel=1e-6)
    for found in run_ranks(train_and_validate, 2, FSDP2.case(dense(), "none"), 1, True):
        assert found["losses"][0] == pytest.approx(expected, rel=1e-5)
