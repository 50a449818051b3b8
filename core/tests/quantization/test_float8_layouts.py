"""float8 in every layout: tensor-wise, the scales of one rank bit for bit; row-wise, within rounding."""

import pytest
from converted_toys import EXACT, check_layouts, dense, sparse

from core.parallel.settings import Parallelism
from core.quantization.converter import Converter
from core.quantization.float8 import Float8LinearConverter
from core.testing.parity import Case

TENSORWISE: list[Converter.Config] = [Float8LinearConverter.Config(emulate=True)]
PACKED: list[Converter.Config] = [Float8LinearConverter.Config(emulate=True, enable_fsdp_float8_all_gather=True)]
ROWWISE: list[Converter.Config] = [Float8LinearConverter.Config(emulate=True, recipe_name="rowwise")]
MIXED: list[Converter.Config] = [Float8LinearConverter.Config(emulate=True, recipe_name="rowwise_with_gw_hp")]
TP2, EP2, PP2 = (
    Parallelism(tensor_parallel_degree=2),
    Parallelism(expert_parallel_degree=2),
    Parallelism(pipeline_parallel_degree=2),
)
FSDP2 = Parallelism()
CASES = {
    "fsdp2-packed": Case(sparse(), FSDP2, 2, converters=PACKED, checkpoint="selective", **EXACT),
    "tp2": Case(dense(), TP2, 2, converters=TENSORWISE, checkpoint="selective", **EXACT),
    "ep2-packed": Case(sparse(), EP2, 2, converters=PACKED, checkpoint="full", **EXACT),
    "pp2": Case(dense(), PP2, 2, converters=TENSORWISE, **EXACT),
    "rowwise-tp2": Case(dense(), TP2, 2, converters=ROWWISE, **EXACT),
}
MORE = {
    "fsdp2": Case(sparse(), FSDP2, 2, converters=TENSORWISE, **EXACT),
    "tp2-packed": Case(dense(), TP2, 2, converters=PACKED, **EXACT),
    "ep2": Case(sparse(), EP2, 2, converters=TENSORWISE, checkpoint="selective", **EXACT),
    "rowwise-fsdp2": Case(sparse(), FSDP2, 2, converters=ROWWISE, checkpoint="selective", **EXACT),
    "rowwise-ep2": Case(sparse(), EP2, 2, converters=ROWWISE, **EXACT),
    "rowwise-pp2": Case(dense(), PP2, 2, converters=ROWWISE, **EXACT),
    "mixed-fsdp2": Case(sparse(), FSDP2, 2, converters=MIXED, checkpoint="selective", **EXACT),
    "mixed-tp2": Case(dense(), TP2, 2, converters=MIXED, **EXACT),
    "mixed-ep2": Case(sparse(), EP2, 2, converters=MIXED, checkpoint="full", **EXACT),
    "mixed-pp2": Case(dense(), PP2, 2, converters=MIXED, **EXACT),
}


@pytest.mark.layout
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.matrix)], ids=["few", "more"])
def test_scales_and_steps_are_those_of_one_rank(cases: dict[str, Case]) -> None:
    """Bit for bit the scales of the first step; of a pipeline those of one rank in microbatches of one row. Row-wise
    there is nothing to ask the ranks for."""
    check_layouts(cases)
