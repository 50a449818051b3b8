"""Every layout computes what one rank computes: the matrix of models, layouts and ways to checkpoint.

Part of `core.testing.model_suite`. A case is named layout-mode, as in tp2-full.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, ClassVar, NamedTuple, cast

import pytest

from core.nn.decoder import Decoder
from core.parallel.rules import check_axes
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.checks import expert_parts
from core.testing.parity import Case, compare

TOLERANCE = 1e-5
"""Largest difference of anything from one rank, as a share of the largest number of its kind (fp32, other sums)."""


class LayoutCase(NamedTuple):
    """Ranks, what they share, and what is special about their step."""

    n: int
    parallelism: Parallelism
    step: dict[str, Any] = {}

    def case(self, model: Decoder.Config, mode: str, **more: Any) -> Case:
        """A step of `model` in this layout, with the way `mode` to checkpoint."""
        return Case(model, self.parallelism, self.n, checkpoint=cast(Any, mode), **{**self.step, **more})


def degrees(
    *, replicate: int = 1, tensor: int = 1, context: int = 1, pipeline: int = 1, expert: int = 1, **more: Any
) -> Parallelism:
    """Settings of these degrees; what is left over shards the weights."""
    return Parallelism(
        data_parallel_replicate_degree=replicate,
        tensor_parallel_degree=tensor,
        context_parallel_degree=context,
        pipeline_parallel_degree=pipeline,
        expert_parallel_degree=expert,
        **{f"pipeline_parallel_{name}" if name == "schedule" else name: value for name, value in more.items()},
    )


SCHEDULES = ["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]

LAYOUTS: dict[str, LayoutCase] = {
    "fsdp2": LayoutCase(2, degrees()),
    "hsdp2x2": LayoutCase(4, degrees(replicate=2)),
    "ddp2": LayoutCase(2, degrees(replicate=2)),
    "tp2": LayoutCase(2, degrees(tensor=2)),
    "tp4": LayoutCase(4, degrees(tensor=4)),
    "fsdp2-tp2": LayoutCase(4, degrees(tensor=2)),
    "cp2": LayoutCase(2, degrees(context=2)),
    "cp2-alltoall": LayoutCase(2, degrees(context=2, context_parallel_rotate_method="alltoall")),
    "cp2-unbalanced": LayoutCase(2, degrees(context=2, context_parallel_load_balancer="none")),
    "cp2-alltoall-tp2": LayoutCase(4, degrees(context=2, tensor=2, context_parallel_rotate_method="alltoall")),
    "fsdp2-cp2-tp2": LayoutCase(8, degrees(context=2, tensor=2)),
    "offload2": LayoutCase(2, degrees(cpu_offload=True)),
    **{f"pp2-{name}": LayoutCase(2, degrees(pipeline=2, schedule=name)) for name in SCHEDULES},
    "fsdp2-pp2": LayoutCase(4, degrees(pipeline=2, schedule="Interleaved1F1B")),
    "tp2-pp2": LayoutCase(4, degrees(pipeline=2, tensor=2)),
    "cp2-pp2": LayoutCase(4, degrees(pipeline=2, context=2)),
    "accumulate": LayoutCase(2, degrees(), {"local_batch_size": 2}),
    "accumulate-hsdp2x2-tp2": LayoutCase(8, degrees(replicate=2, tensor=2), {"local_batch_size": 1}),
    "no-label-fsdp2": LayoutCase(2, degrees(), {"empty_rows": 4}),
    "no-label-fsdp2-tp2": LayoutCase(4, degrees(tensor=2), {"empty_rows": 4}),
    "no-label-fsdp2-pp2": LayoutCase(4, degrees(pipeline=2), {"empty_rows": 4}),
    "odd-tp2": LayoutCase(2, degrees(tensor=2), {"length": 14, "n_rows": 6}),
}

EXPERT_LAYOUTS: dict[str, LayoutCase] = {
    "ep2": LayoutCase(2, degrees(expert=2)),
    "ep2-fsdp2": LayoutCase(4, degrees(expert=2)),
    "ep4": LayoutCase(4, degrees(expert=4)),
    "ep2-reference": LayoutCase(2, degrees(expert=2, expert_parallel_comm_backend="reference")),
    "ep4-reference": LayoutCase(4, degrees(expert=4, expert_parallel_comm_backend="reference")),
    "ep2-hsdp2": LayoutCase(4, degrees(replicate=2, expert=2)),
    "ep2-tp2": LayoutCase(2, degrees(expert=2, tensor=2)),
    "ep4-tp2-fsdp2": LayoutCase(4, degrees(expert=4, tensor=2)),
    "ep4-tp2-cp2": LayoutCase(4, degrees(expert=4, tensor=2, context=2)),
    "ep2-pp2": LayoutCase(4, degrees(expert=2, pipeline=2)),
    "fsdp2-tp2-pp2-ep4": LayoutCase(8, degrees(expert=4, tensor=2, pipeline=2, schedule="Interleaved1F1B")),
    "accumulate-ep2-fsdp2": LayoutCase(4, degrees(expert=2), {"local_batch_size": 1}),
    "no-label-ep2": LayoutCase(2, degrees(expert=2), {"empty_rows": 4}),
    "odd-ep2-tp2": LayoutCase(2, degrees(expert=2, tensor=2), {"length": 14, "n_rows": 6}),
    "idle-ep2": LayoutCase(2, degrees(expert=2), {"idle_experts": range(4, 8)}),
    "idle-ep4-tp2-fsdp2": LayoutCase(4, degrees(expert=4, tensor=2), {"idle_experts": range(2)}),
}
"""`no-label`: a rank whose rows have no label that counts; `odd`: a number of tokens that only its factors divide;
`idle`: a rank whose experts no token chooses."""

CHECKPOINT_MODES = ["none", "full", "selective"]

FEW = [
    "fsdp2-selective",
    "tp2-full",
    "cp2-selective",
    "cp2-alltoall-none",
    "pp2-1F1B-selective",
    "pp2-ZBVZeroBubble-none",
    "ep2-selective",
    "ep4-tp2-fsdp2-full",
]
"""The cases that every test run does: those that a model's own parts could get wrong; `nox -s matrix` runs all."""


class LayoutSuite:
    """The tests of a model in every layout."""

    decoder: ClassVar[Any]
    """The model."""
    sizes: ClassVar[dict[str, Decoder.Config]]
    """Its sizes by name."""
    spread: ClassVar[Any]
    """A configuration of transformers for a small model of 8 experts if any, whose heads, layers and experts four ranks
    can share."""

    @classmethod
    def spread_config(cls) -> Decoder.Config:
        """Our configuration of `spread`."""
        return cls.decoder.from_hf_config(cls.spread.to_dict())

    @classmethod
    def layout_cases(cls) -> list[str]:
        """The names of all cases that make sense for the model."""
        tied = cls.spread_config().tie_embeddings
        layouts = LAYOUTS | (EXPERT_LAYOUTS if expert_parts(cls.spread_config()) else {})
        names = [f"{layout}-{mode}" for layout, mode in product(layouts, CHECKPOINT_MODES)]
        refused: list[Callable[[str], bool]] = [
            lambda name: "pp2" in name and tied,
            lambda name: "selective" in name and any(schedule in name for schedule in SCHEDULES[-3:]),
        ]
        return [name for name in names if not any(refuses(name) for refuses in refused)]

    @classmethod
    def layout_parameters(cls) -> list[Any]:
        """All cases, the many marked `matrix`."""
        return [
            pytest.param(name, marks=() if name in FEW else pytest.mark.matrix, id=name) for name in cls.layout_cases()
        ]

    def test_every_axis_has_a_rule(self, size: str) -> None:
        check_axes(meta_model(self.sizes[size]))

    @pytest.mark.layout
    def test_layout_equals_one_rank(self, layout: str, record_property: Callable[[str, object], None]) -> None:
        name, mode = layout.rsplit("-", 1)
        model = self.spread_config()
        ranks = (LAYOUTS | EXPERT_LAYOUTS)[name]
        if "idle_experts" in ranks.step:
            let_choices_be_biased(model)
        found = compare(ranks.case(model, mode))
        label = type(self).__name__.removeprefix("Test")
        record_property("differences", {"model": label, "layout": name, **found})
        assert_equal(found)

    @pytest.mark.layout
    @pytest.mark.matrix
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
    @pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # dynamo does, torch 2.13
    @pytest.mark.parametrize("mode", ["none", "selective"])
    @pytest.mark.parametrize("name", ["fsdp2", "tp2", "ep2", "ep2-reference"])
    def test_compiled_layout_equals_one_rank(
        self, name: str, mode: str, record_property: Callable[[str, object], None]
    ) -> None:
        """A break of a graph would be an error: blocks are compiled whole."""
        if f"{name}-{mode}" not in self.layout_cases():
            pytest.skip("the model has no experts")
        found = compare((LAYOUTS | EXPERT_LAYOUTS)[name].case(self.spread_config(), mode, compile="aot_eager"))
        label = type(self).__name__.removeprefix("Test")
        record_property("differences", {"model": label, "layout": f"compiled-{name}", **found})
        assert_equal(found)


def assert_equal(found: dict[str, float], tolerance: float = TOLERANCE) -> None:
    """Fail if `found`, the result of `compare`, says that a layout computes something else than one rank."""
    assert found["start"] == found.get("counts", 0) == 0, f"weights start or tokens are counted otherwise: {found}"
    wrong = {kind: value for kind, value in found.items() if not value <= tolerance}
    assert not wrong, f"differs from one rank: {wrong}"


def let_choices_be_biased(model: Decoder.Config) -> None:
    """Give every router a bias on the choice."""
    for config in expert_parts(model):
        config.router.load_balance_coeff = 1e-3
