"""Numbers in blocks, and weights rounded to few bits, in every layout and compiled: those of one rank, with its
scales."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from converted_toys import EXACT, check_layouts, dense, one_rank, sparse

from core.parallel.settings import Parallelism
from core.quantization.aware import QATConverter
from core.quantization.converter import Converter
from core.quantization.float8 import Float8LinearConverter
from core.quantization.microscaling import FP4LinearConverter, MXFP8LinearConverter
from core.testing.parity import Case, StepResult, largest_differences, result_of
from core.testing.ranks import run_ranks

CONVERTERS: dict[str, Converter.Config] = {
    "mxfp8": MXFP8LinearConverter.Config(emulate=True),
    "nvfp4": FP4LinearConverter.Config(
        emulate=True, stochastic_rounding=False, random_hadamard=True, square_weight_blocks=True
    ),
    "mxfp4": FP4LinearConverter.Config(emulate=True, recipe_name="mxfp4", stochastic_rounding=False),
    "qat-mxfp4": QATConverter.Config(),
    "qat-nvfp4": QATConverter.Config(weight_dtype="nvfp4"),
}
"""Without chance, which has other draws on each rank."""
LAYOUTS = {
    "fsdp2": (dense(), Parallelism(), "selective"),
    "experts-fsdp2": (sparse(), Parallelism(), "selective"),
    "tp2": (dense(), Parallelism(tensor_parallel_degree=2), "selective"),
    "ep2": (sparse(), Parallelism(expert_parallel_degree=2), "full"),
    "pp2": (dense(), Parallelism(pipeline_parallel_degree=2), "none"),
}
CASES = {
    f"{name}-{layout}": Case(model, parallelism, 2, converters=[converter], checkpoint=checkpoint, **EXACT)
    for name, converter in CONVERTERS.items()
    for layout, (model, parallelism, checkpoint) in LAYOUTS.items()
}
ROUNDED = ["nvfp4-experts-fsdp2", "mxfp4-experts-fsdp2"]
"""Gradients of experts' weights are summed over blocks of tokens, and a rank has other blocks of an expert's tokens
than one rank alone, with other scales. Eight bits with powers of two as scales do not feel that."""


@pytest.mark.layout
@pytest.mark.matrix
def test_steps_are_those_of_one_rank() -> None:
    """Blocks lie within a rank's tokens and slices here; those of NVFP4 have a scale of the whole tensor as well."""
    check_layouts(CASES, dict.fromkeys(ROUNDED, 0.25), timeout_s=400)


COMPILED = {
    "float8-fsdp2": replace(
        CASES["mxfp8-experts-fsdp2"],
        converters=[Float8LinearConverter.Config(emulate=True, enable_fsdp_float8_all_gather=True)],
    ),
    "nvfp4-tp2": replace(CASES["nvfp4-tp2"], checkpoint="none"),
    "mxfp8-ep2": replace(CASES["mxfp8-ep2"], checkpoint="selective"),
    "qat-mxfp4-fsdp2": CASES["qat-mxfp4-experts-fsdp2"],
}


def compiled(cases: dict[str, Case]) -> dict[str, StepResult]:
    """A step of each with compiled blocks."""
    found = {}
    for name, case in cases.items():
        torch.compiler.reset()
        found[name] = result_of(replace(case, compile="aot_eager"))
    return found


def ignore_dynamo(test: Any) -> Any:
    """What torch 2.13's dynamo does that warns."""
    about = ["The .grad attribute of a Tensor that is not a leaf", ".* should not be instantiated:DeprecationWarning"]
    for message in about:
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


def use_plain_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the forms that a compiler gets, since those for a CPU round otherwise."""
    for place in ("layers", "feed_forward", "rope"):
        monkeypatch.setattr(f"core.nn.{place}.cpu_forms", lambda x: None)


@pytest.mark.layout
@pytest.mark.matrix
@ignore_dynamo
def test_compiled_steps_are_those_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_ranks(compiled, 2, COMPILED, timeout_s=400)
    use_plain_forms(monkeypatch)
    for name, case in COMPILED.items():
        differences = largest_differences([ranks[name] for ranks in found], result_of(one_rank(case)))
        assert max(differences["loss"], differences["next loss"]) < 1e-6, (name, differences)
        assert differences["gradient"] < 1e-5, (name, differences)


@ignore_dynamo
@pytest.mark.parametrize("name", ["nvfp4", "qat-nvfp4"])
def test_compiled_blocks_have_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(dense(), converters=[CONVERTERS[name]], checkpoint="selective")
    use_plain_forms(monkeypatch)
    differences = largest_differences(list(compiled({name: case}).values()), result_of(case))
    assert not any(differences.values()), differences
