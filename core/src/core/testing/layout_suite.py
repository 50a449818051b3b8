"""Every layout computes what one rank computes: the matrix of models, layouts and ways to checkpoint.

Part of `core.testing.model_suite`. A case is named layout-mode, as in tp2-full.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, ClassVar, cast

import pytest

from core.nn.decoder import Decoder
from core.nn.moe import MoE
from core.parallel.settings import Parallelism
from core.testing.parity import Case, compare
from core.train.checks import parts

TOLERANCE = 1e-5
"""Largest difference of anything from one rank, as a share of the largest number of its kind (fp32, other sums)."""


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

LAYOUTS: dict[str, tuple[int, Parallelism]] = {
    "fsdp2": (2, degrees()),
    "hsdp2x2": (4, degrees(replicate=2)),
    "ddp2": (2, degrees(replicate=2)),
    "tp2": (2, degrees(tensor=2)),
    "fsdp2-tp2": (4, degrees(tensor=2)),
    "cp2": (2, degrees(context=2)),
    "cp2-alltoall": (2, degrees(context=2, context_parallel_rotate_method="alltoall")),
    "cp2-unbalanced": (2, degrees(context=2, context_parallel_load_balancer="none")),
    "fsdp2-cp2-tp2": (8, degrees(context=2, tensor=2)),
    "offload2": (2, degrees(cpu_offload=True)),
    "accumulate": (2, degrees()),
    **{f"pp2-{name}": (2, degrees(pipeline=2, schedule=name)) for name in SCHEDULES},
    "fsdp2-pp2": (4, degrees(pipeline=2, schedule="Interleaved1F1B")),
    "tp2-pp2": (4, degrees(pipeline=2, tensor=2)),
    "cp2-pp2": (4, degrees(pipeline=2, context=2)),
}

EXPERT_LAYOUTS: dict[str, tuple[int, Parallelism]] = {
    "ep2": (2, degrees(expert=2)),
    "ep2-fsdp2": (4, degrees(expert=2)),
    "ep4": (4, degrees(expert=4)),
    "ep2-tp2": (2, degrees(expert=2, tensor=2)),
    "ep4-tp2-fsdp2": (4, degrees(expert=4, tensor=2)),
    "ep4-tp2-cp2": (4, degrees(expert=4, tensor=2, context=2)),
    "ep2-pp2": (4, degrees(expert=2, pipeline=2)),
    "fsdp2-tp2-pp2-ep4": (8, degrees(expert=4, tensor=2, pipeline=2, schedule="Interleaved1F1B")),
}

MODES = ["none", "full", "selective"]

FEW = [
    "fsdp2-selective",
    "hsdp2x2-none",
    "tp2-full",
    "cp2-selective",
    "cp2-alltoall-none",
    "accumulate-none",
    "pp2-1F1B-selective",
    "pp2-ZBVZeroBubble-none",
    "ep2-selective",
    "ep4-tp2-fsdp2-full",
]
"""The cases that every test run does; the others are for `nox -s matrix`."""


class LayoutSuite:
    """The tests of a model in every layout."""

    decoder: ClassVar[type[Decoder]]
    """The model."""
    spread: ClassVar[Any]
    """A configuration of transformers for a small model whose heads, layers and experts four ranks can share."""

    @classmethod
    def spread_config(cls) -> Decoder.Config:
        """Our configuration of `spread`."""
        return cls.decoder.from_hf_config(cls.spread.to_dict())

    @classmethod
    def layout_cases(cls) -> list[str]:
        """The names of all cases that make sense for the model."""
        tied = cls.spread_config().tie_embeddings
        sparse = any(isinstance(config, MoE.Config) for _, config in parts(cls.spread_config(), "model"))
        names = [f"{layout}-{mode}" for layout, mode in product(LAYOUTS | (EXPERT_LAYOUTS if sparse else {}), MODES)]
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

    def test_layout_equals_one_rank(self, layout: str, record_property: Callable[[str, object], None]) -> None:
        name, mode = layout.rsplit("-", 1)
        world_size, settings = (LAYOUTS | EXPERT_LAYOUTS)[name]
        local_batch_size = 2 if name == "accumulate" else -1
        case = Case(
            self.spread_config(), settings, world_size, checkpoint=cast(Any, mode), local_batch_size=local_batch_size
        )
        found = compare(case)
        record_property("differences", {"model": type(self).__name__.removeprefix("Test"), "layout": layout, **found})
        assert found["start"] == found.get("counts", 0) == 0, f"weights start or tokens are counted otherwise: {found}"
        wrong = {kind: value for kind, value in found.items() if not value <= TOLERANCE}
        assert not wrong, f"differs from one rank: {wrong}"
