"""The layout of a group's rank whose steps count the tokens of all groups."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from core.data.packing import Batch
from core.nn.decoder import Decoder
from core.nn.init import LocalSlice
from core.parallel.layout import RankView, Wrapping
from core.parallel.pipeline import Microbatch
from core.parallel.vocabulary import Vocabulary


class GroupView(RankView):
    """The place of a rank in its group; `of_data` sums over groups what is summed over ranks that read different
    rows."""

    def __init__(self, own: RankView, of_data: Callable[[float], float]) -> None:
        super().__init__(own.settings, own.degrees, own.device)
        self.own, self.of_data = own, of_data
        self.data_rank, self.pipeline_rank = own.data_rank, own.pipeline_rank
        self.is_first, self.gathers = own.is_first, own.gathers

    def sum_of_data(self, value: float) -> float:
        return self.of_data(self.own.sum_of_data(value))

    def sums(self, *values: float) -> list[float]:
        return self.own.sums(*values)

    def maxima(self, *values: float) -> list[float]:
        return self.own.maxima(*values)

    def sum_counts(self, counts: list[Tensor]) -> None:
        self.own.sum_counts(counts)

    def sum_gradients(self, stages: list[Decoder], *, now: bool) -> None:
        self.own.sum_gradients(stages, now=now)

    def measure_weights(self, stages: list[Decoder]) -> None:
        self.own.measure_weights(stages)

    def let_go(self, stages: list[Decoder]) -> None:
        self.own.let_go(stages)

    def join(self, found: dict[str, Any]) -> dict[str, Any]:
        return self.own.join(found)

    def to_rank_tokens(self, batch: Batch, *, documents: bool, n_labels: int | None = None) -> Microbatch:
        return self.own.to_rank_tokens(batch, documents=documents, n_labels=n_labels)

    def vocabulary(self, size: int) -> Vocabulary:
        return self.own.vocabulary(size)

    def squared_norms(self, gradients: list[Tensor]) -> Tensor:
        return self.own.squared_norms(gradients)

    def joint_norm(self, squares: Tensor) -> float:
        return self.own.joint_norm(squares)

    def parallelize(self, model: Decoder, wrapping: Wrapping) -> None:
        self.own.parallelize(model, wrapping)

    def local_slice(self, weight: Tensor) -> LocalSlice:
        return self.own.local_slice(weight)

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], slices: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        return self.own.map_matrices(function, weights, slices)

    def row_blocks(self, weight: Tensor, size: int) -> Tensor:
        return self.own.row_blocks(weight, size)

    def pipeline(self, stages: dict[int, Decoder], n_microbatches: int) -> None:
        return None
