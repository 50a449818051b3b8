"""The layout of a run of several ranks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from core.data.packing import Batch
from core.nn.decoder import Decoder
from core.nn.init import LocalSlice
from core.parallel.apply import dtensor_slice, parallelize, row_blocks
from core.parallel.context import split_rows
from core.parallel.data import squared_norm_parts
from core.parallel.layout import RankView, Wrapping, whole_rows
from core.parallel.matrices import map_matrices
from core.parallel.mesh import stage_group, views
from core.parallel.packed import PackedWeights
from core.parallel.pipeline import Microbatch, Pipeline, n_stages
from core.parallel.settings import Parallelism
from core.parallel.tensor import CutVocabulary
from core.parallel.vocabulary import Vocabulary, WholeVocabulary


class ManyRanks(RankView):
    """One rank of the process group, and its place in the meshes."""

    def __init__(self, settings: Parallelism, device: torch.device) -> None:
        super().__init__(settings, settings.degrees(dist.get_world_size()), device)
        self.views = views(self.degrees, device)
        self.stage_group = stage_group(self.views, device)
        token = self.views.token
        self.data_rank = token["replicate"].get_local_rank() * self.degrees.shard + token["batch"].get_local_rank()
        self.pipeline_rank = token["pipeline"].get_local_rank()
        self.is_first, self.gathers = dist.get_rank() == 0, True
        self.packed: PackedWeights | None = None

    def sums(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def maxima(self, *values: float) -> list[float]:
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def sum_of_data(self, value: float) -> float:
        return self.sums(value)[0] * self.degrees.data / self.degrees.world

    def sum_counts(self, counts: list[Tensor]) -> None:
        if not counts:
            return
        joined = torch.stack(counts)
        for axis in ("replicate", "batch", "context", "tensor"):
            dist.all_reduce(joined, group=self.views.token[axis].get_group())
        for mine, total in zip(counts, joined, strict=True):
            mine.copy_(total)

    def sum_gradients(self, stages: list[Decoder], *, now: bool) -> None:
        for stage in stages:
            cast(FSDPModule, stage).set_requires_gradient_sync(now)

    def measure_weights(self, stages: list[Decoder]) -> None:
        if self.packed is None:
            self.packed = PackedWeights(stages)
        self.packed.measure(self.stage_group)

    def let_go(self, stages: list[Decoder]) -> None:
        for module in (module for stage in stages for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def join(self, found: dict[str, Any]) -> dict[str, Any]:
        if self.degrees.pipeline == 1:
            return found
        stages: list[dict[str, Any]] = [{}] * self.degrees.pipeline
        dist.all_gather_object(stages, found, group=self.views.token["pipeline"].get_group())
        return {name: value for stage in stages for name, value in stage.items()}

    def to_rank_tokens(self, batch: Batch, *, documents: bool, n_labels: int | None = None) -> Microbatch:
        if self.degrees.context == 1:
            return whole_rows(batch, self.device, documents=documents, n_labels=n_labels)
        ranks, balanced = self.views.token["context"], self.settings.context_parallel_load_balancer == "headtail"
        return split_rows(batch, ranks, self.device, documents=documents, balanced=balanced, n_labels=n_labels)

    def vocabulary(self, size: int) -> Vocabulary:
        return WholeVocabulary(size) if self.degrees.tensor == 1 else CutVocabulary(self.views.token["tensor"], size)

    def squared_norms(self, gradients: list[Tensor]) -> Tensor:
        return squared_norm_parts(gradients, self.degrees.world // self.degrees.pipeline)

    def joint_norm(self, squares: Tensor) -> float:
        (squared,) = self.sums(squares.sum().item())
        return squared**0.5

    def parallelize(self, model: Decoder, wrapping: Wrapping) -> None:
        parallelize(model, self.views, self.settings, wrapping)

    def local_slice(self, weight: Tensor) -> LocalSlice:
        return dtensor_slice(weight)

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], slices: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        return iter(map_matrices(function, weights, slices, self.stage_group, self.device))

    def row_blocks(self, weight: Tensor, size: int) -> Tensor:
        return row_blocks(weight, size)

    def pipeline(self, stages: dict[int, Decoder], n_microbatches: int) -> Pipeline | None:
        if self.degrees.pipeline == 1:
            return None
        (n_layers,) = {stage.config.n_layers for stage in stages.values()}
        n, mesh = n_stages(self.settings, n_layers), self.views.token["pipeline"]
        return Pipeline(stages, self.settings, mesh, self.device, n_stages=n, n_microbatches=n_microbatches)
