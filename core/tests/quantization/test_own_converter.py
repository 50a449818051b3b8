"""A user's own converter, as a document has it: in a run, in a file, over ranks."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_toys import EXACT, dense, sparse
from converters_of_a_user import Stepped, SteppedConverter

from core.parallel.settings import Parallelism
from core.testing.parity import Case, alone, largest_differences, result_of
from core.testing.ranks import run_ranks
from core.testing.toy import on_cpu

STEPPED: list[Any] = [SteppedConverter.Config(n_steps=3)]
CASES = {
    "tp2": Case(dense(), Parallelism(tensor_parallel_degree=2), 2, converters=STEPPED, checkpoint="selective", **EXACT),
    "ep2": Case(sparse(), Parallelism(expert_parallel_degree=2), 2, converters=STEPPED, **EXACT),
}


def results(cases: dict[str, Case]) -> dict[str, Any]:
    return {name: result_of(case) for name, case in cases.items()}


@pytest.mark.layout
def test_layouts_equal_one_rank() -> None:
    found = run_ranks(results, 2, CASES)
    for name, case in CASES.items():
        differences = largest_differences([each[name] for each in found], result_of(alone(case)))
        assert max(differences.values()) < 1e-5, (name, differences)


def test_it_computes_what_it_says() -> None:
    model = on_cpu(dense())
    SteppedConverter.Config(n_steps=3, patterns=["layers.0.attention.wq"]).build().apply(model)
    layer = model.layers["0"].attention.wq
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.eye(64, requires_grad=True)
    y = layer(x)
    step = layer.weight.abs().max() / 3
    steps = (y.T / step).round()
    assert set(steps.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    torch.testing.assert_close(y.T, steps * step)
    assert (y.T - layer.weight).abs().max() <= step / 2 * 1.001
    y.sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


def test_the_document_has_the_converter_that_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs/add-a-converter.md").read_text(encoding="utf-8")
    assert inspect.getsource(Stepped) in text and inspect.getsource(SteppedConverter) in text
