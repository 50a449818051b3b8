"""The comparison of layouts with one rank sees each thing that could be wrong: one is broken at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layout_cases import CP, EP2, FSDP2, TP2, dense, piped, sparse
from torch.distributed.fsdp import FSDPModule

import core.parallel.apply
import core.parallel.context
import core.parallel.data
import core.parallel.many_ranks
import core.parallel.tensor
from core.nn import moe
from core.nn.balance import routers
from core.nn.decoder import Decoder
from core.nn.init import LocalSlice
from core.parallel.apply import sum_over_rows
from core.parallel.many_ranks import ManyRanks
from core.parallel.mesh import Views
from core.testing import parity
from core.testing.layout_suite import TOLERANCE
from core.testing.parity import Case, StepResult, compare, result_of


def plain(weight: Any) -> torch.Tensor:
    return weight.to_local()


def local_positions(*args: Any, **kwargs: Any) -> Any:
    part = core.parallel.context.split_rows(*args, **kwargs)
    index_1L = torch.arange(part.tokens_BL.shape[1])[None]
    return part._replace(positions=part.positions._replace(position_BL=index_1L))


def from_the_first(weight: torch.Tensor) -> LocalSlice:
    piece = core.parallel.apply.dtensor_slice(weight)
    return LocalSlice(piece.value, (0,) * weight.dim())


def scaled_parts(*args: Any) -> Any:
    parts = parity_parts(*args)
    parts.pipeline.schedule.scale_grads = True
    return parts


parity_parts = parity.build_case


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def own_alone(self: ManyRanks, value: float) -> float:
    return value


def own_counts(model: Decoder, views: Views) -> None:
    """Routers know which tokens are theirs, and count the choices of these alone."""
    sum_over_rows(model, views)
    for router in routers(model).values():
        router.row_counts._forward_hooks.clear()


BREAKS: dict[str, Callable[[], Any]] = {
    "gradients of copies are not summed": lambda: patch.object(core.parallel.tensor, "summed", plain),
    "every rank adds a row bias": lambda: patch.object(core.parallel.tensor, "zeros", core.parallel.tensor.summed),
    "gradients are averaged": lambda: patch.multiple(
        FSDPModule, set_gradient_divide_factor=nothing, set_force_sum_reduction_for_comms=nothing
    ),
    "gradients of a pipeline are averaged": lambda: patch.object(parity, "build_case", scaled_parts),
    "tokens are counted when they are computed again": lambda: patch.object(moe, "is_recomputing", lambda: False),
    "counts stay on their ranks": lambda: patch.object(ManyRanks, "sum_counts", nothing),
    "positions are those in the piece": lambda: patch.object(core.parallel.many_ranks, "split_rows", local_positions),
    "choices are counted in parts of rows": lambda: patch.object(core.parallel.apply, "sum_over_rows", own_counts),
    "pieces start as the first one": lambda: patch.object(core.parallel.many_ranks, "dtensor_slice", from_the_first),
    "the denominator is a rank's": lambda: patch.object(ManyRanks, "sum_of_data", own_alone),
    "the norm counts copies twice": lambda: patch.object(core.parallel.data, "count_pieces", lambda gradient: 1),
    "only the first microbatch is summed": lambda: patch.object(
        ManyRanks,
        "sum_gradients",
        lambda self, parts, *, now: [part.set_requires_gradient_sync(not now) for part in parts],
    ),
}

BALANCED = sparse(router={"balance_loss_coeff": 0.5})
RED: dict[str, tuple[Case, set[str], set[str]]] = {  # break -> case, what must differ, what does not
    "gradients of copies are not summed": (TP2.case(sparse(), "none"), {"gradient", "grad norm"}, {"loss"}),
    "every rank adds a row bias": (TP2.case(dense(), "none"), {"next loss", "gradient"}, {"start"}),
    "gradients are averaged": (FSDP2.case(dense(), "none"), {"gradient", "grad norm"}, {"loss"}),
    "gradients of a pipeline are averaged": (piped(2, "1F1B").case(dense(), "none"), {"gradient"}, {"loss"}),
    "tokens are counted when they are computed again": (EP2.case(sparse(), "full"), {"counts"}, {"loss", "gradient"}),
    "counts stay on their ranks": (EP2.case(sparse(), "none"), {"counts"}, {"loss", "gradient"}),
    "positions are those in the piece": (CP["cp2"].case(dense(), "none"), {"loss", "gradient"}, {"start"}),
    "choices are counted in parts of rows": (TP2.case(BALANCED, "none"), {"balance loss", "gradient"}, {"loss"}),
    "pieces start as the first one": (FSDP2.case(dense(), "none"), {"start", "loss"}, set()),
    "the denominator is a rank's": (FSDP2.case(dense(), "none"), {"loss", "gradient"}, {"start"}),
    "the norm counts copies twice": (FSDP2.case(dense(), "none"), {"grad norm"}, {"loss"}),
    "only the first microbatch is summed": (FSDP2.case(dense(), "none", local_batch_size=2), {"gradient"}, {"loss"}),
}


def broken(name: str, case: Case) -> StepResult:
    with BREAKS[name]():
        return result_of(case)


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_seen(name: str) -> None:
    case, red, green = RED[name]
    found = compare(case, run=partial(broken, name))
    assert {kind for kind in red if found[kind] <= 10 * TOLERANCE} == set(), found
    assert {kind for kind in green if found[kind] > TOLERANCE} == set(), found
