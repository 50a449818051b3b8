"""A kernel written outside of core: chosen by its name, right in every layout, and refused for what it cannot do."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_of_a_user
import pytest
import torch
from attention_by_loops import WHERES, looped, numbers
from kernel_of_a_user import Tiled

from core.config.errors import UserError
from core.config.validate import validate
from core.generate.cache import CachedDecoder
from core.nn.backends import register_kernel
from core.nn.kernel import Positions
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.checks import check_model
from core.step.settings import Training
from core.testing.parity import Case, StepResult, compare, result_of
from core.testing.toy import Toy, on_cpu, randomise, toy_attention
from core.train.trainer import Trainer

CPU = torch.device("cpu")
LAYOUTS = {
    "fsdp2": Parallelism(),
    "tp2": Parallelism(tensor_parallel_degree=2),
    "cp2": Parallelism(context_parallel_degree=2),
    "cp2-alltoall": Parallelism(context_parallel_degree=2, context_parallel_rotate_method="alltoall"),
    "pp2": Parallelism(pipeline_parallel_degree=2),
}


def toy(**changes: Any) -> Toy.Config:
    return Toy.Config(attention=replace(toy_attention(), **{"backend": "tiled", "window": 11, **changes}))


def step(case: Case) -> StepResult:
    """In a process that has imported this file, and so knows the kernel."""
    return result_of(case)


@pytest.mark.parametrize("positions", WHERES.values(), ids=WHERES.keys())
@pytest.mark.parametrize("window", [None, 3])
def test_it_computes_attention(positions: Positions, window: int | None) -> None:
    _, n_queries, n_keys = positions.grid
    q, k, v = numbers(2, 4, n_queries, 6), numbers(2, 2, n_keys, 6, seed=1), numbers(2, 2, n_keys, 5, seed=2)
    kernel = Tiled(window)
    found = kernel(q, k, v, kernel.mask(positions), scale=0.4)
    torch.testing.assert_close(found, looped(q, k, v, positions, scale=0.4, window=window))


@pytest.mark.layout
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_rank(layout: str) -> None:
    worst = compare(Case(toy(), LAYOUTS[layout], world_size=2, checkpoint="selective"), step)
    assert worst["loss"] < 1e-6 and worst["gradient"] < 1e-5 and worst["next loss"] < 1e-5


def test_one_rank_equals_pytorchs_kernel() -> None:
    found, expected = (result_of(Case(toy(backend=name))) for name in ("tiled", "sdpa"))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_it_attends_to_kept_keys() -> None:
    model = on_cpu(toy()).eval()
    randomise(model, seed=0)
    tokens_BL = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    expected_BLV = model(tokens_BL)
    with CachedDecoder(model, n_pads=[0, 0], capacity=20) as cached:
        for end, piece_BL in zip((7, 8, 20), tokens_BL.split([7, 1, 12], 1), strict=True):
            torch.testing.assert_close(cached(piece_BL), expected_BLV[:, end - 1], rtol=0, atol=1e-5)


def test_what_it_cannot_do_is_refused_before_anything_is_built() -> None:
    run = Trainer.Config(model=toy(sinks=True))
    with pytest.raises(
        UserError, match='attention.backend "tiled": it has no sinks: use --model.attention.backend sdp'
    ):
        check_model(meta_model(run.model), run, CPU)
    run.model = toy()
    check_model(meta_model(run.model), run, CPU)


def test_a_kernel_is_asked_for_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Tiled, "problem", lambda _, use: asked.append(use))
    parallelism = Parallelism(tensor_parallel_degree=2, context_parallel_degree=2)
    run = Trainer.Config(model=toy(), training=Training(mask="document"), parallelism=parallelism)
    check_model(meta_model(run.model), run, CPU)
    run.training.mask, parallelism.context_parallel_degree, run.training.mixed_precision_param = "causal", 1, "bfloat16"
    check_model(meta_model(run.model), run, CPU)
    first, last = asked[0], asked[-1]
    assert (first.n_heads, first.n_kv_heads, first.qk_dim, first.v_dim) == (2, 1, 8, 8)
    assert first.trains and first.documents and first.reordered and not first.cached and not first.sinks
    assert (first.dtype, last.dtype) == (torch.float32, torch.bfloat16)
    assert not last.documents and not last.reordered


def test_a_name_that_nobody_registered() -> None:
    with pytest.raises(
        UserError, match="model.attention.backend: no attention kernel is called 'tild'; did you mean til"
    ):
        validate(Trainer.Config(model=toy(backend="tild")))
    with pytest.raises(ValueError, match="two attention kernels are called sdpa: core.nn.sdpa has one"):
        register_kernel("sdpa")(Tiled)


def test_the_document_has_the_kernel_that_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs/add-a-kernel.md").read_text(encoding="utf-8")
    source = inspect.getsource(kernel_of_a_user)
    code = source.partition("\n\n")[2].strip()
    assert code in text and not re.search(r"\._[a-z]", code)
    assert len([line for line in code.splitlines() if line]) <= 40
