"""What a rank is among all: which rows it reads, which part of them it computes, and sums over all ranks.

This file loads nothing of `torch.distributed.tensor`, so that a process alone starts quickly.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from core.activation_checkpoint.apply import Layered
from core.data.packing import Batch, count_labels
from core.nn.decoder import Decoder
from core.nn.dispatch import Dispatcher
from core.nn.init import LocalSlice, full_slice
from core.nn.kernel import Positions
from core.nn.tiling import spans
from core.optim.clip import scale_down, squared_norms
from core.optim.weight import local_tensor
from core.parallel.pipeline import Microbatch, Pipeline
from core.parallel.settings import Degrees, Parallelism
from core.parallel.vocabulary import Vocabulary, WholeVocabulary
from core.runtime.device import to_device


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """What is put around the blocks of a model, wherever they lie."""

    compute_dtype: torch.dtype
    """Weights are gathered in it."""
    checkpoint: Callable[[Layered], None]
    """Decides what backward keeps."""
    dispatcher: Callable[[ProcessGroup], Dispatcher]
    """Makes what takes tokens to the experts of a process group."""
    compile_block: Callable[[nn.Module], None] | None = None
    share_weights: Callable[..., None] | None = None
    """Has data ranks share the weights of a model; None is FSDP (`core.parallel.data.apply_data`, whose arguments it
    takes)."""

    def of_one_rank(self, model: Decoder) -> None:
        """The steps that concern one rank: what is kept for backward, then compilation of it."""
        for stack in stacks(model):
            self.checkpoint(stack)
        if self.compile_block is not None:
            for block in (block for stack in stacks(model) for block in stack.layers.values()):
                self.compile_block(block)


def stacks(model: Decoder) -> list[Layered]:
    """The parts of a model that have blocks, `layers`, each of which is checkpointed, compiled and gathered as one: the
    model itself, and others in it, such as a tower that reads images."""
    found = [part for part in model.modules() if isinstance(getattr(part, "layers", None), nn.ModuleDict)]
    return cast(list[Layered], found)


class RankView(ABC):
    """One rank's place in the layout of a run."""

    data_rank: int
    """Number of this rank among those that read different rows."""
    pipeline_rank: int
    is_first: bool
    """Whether this rank speaks for all."""
    gathers: bool
    """Whether weights are gathered for each use, in the type that is computed in."""

    def __init__(self, settings: Parallelism, degrees: Degrees, device: torch.device) -> None:
        self.settings, self.degrees, self.device = settings, degrees, device

    @abstractmethod
    def sums(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in double precision."""

    @abstractmethod
    def maxima(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""

    @abstractmethod
    def sum_of_data(self, value: float) -> float:
        """A value that is equal on the ranks which read equal rows, summed over those that read different ones."""

    @abstractmethod
    def sum_counts(self, counts: list[Tensor]) -> None:
        """Sum counters of tokens, of any shape, in place, over the ranks that hold the same blocks."""

    @abstractmethod
    def sum_gradients(self, stages: list[Decoder], *, now: bool) -> None:
        """Let the next backward sum gradients over ranks, or leave that to a later one of the step."""

    @abstractmethod
    def measure_weights(self, stages: list[Decoder]) -> None:
        """Find the scales of weights that are gathered in few bits: before each use of weights that were changed."""

    @abstractmethod
    def let_go(self, stages: list[Decoder]) -> None:
        """Gather weights anew before they are used again."""

    @abstractmethod
    def join(self, found: dict[str, Any]) -> dict[str, Any]:
        """What all pipeline stages found, by name."""

    @abstractmethod
    def to_rank_tokens(self, batch: Batch, *, documents: bool, n_labels: int | None = None) -> Microbatch:
        """What this rank computes of the rows it reads, on its device.

        Its labels that count are counted, or are `n_labels`: fake tensors have no number to count.
        """

    @abstractmethod
    def vocabulary(self, size: int) -> Vocabulary:
        """The vocabulary of a head of `size` rows, as this rank holds it."""

    @abstractmethod
    def squared_norms(self, gradients: list[Tensor]) -> Tensor:
        """This rank's parts of the squared 2-norms of gradients, of any shape, (n,) in fp64; parts of all ranks add up
        to the squares."""

    @abstractmethod
    def joint_norm(self, squares: Tensor) -> float:
        """The 2-norm of gradients together, on all ranks, of which this rank has these squared norms (n,)."""

    @torch.no_grad()
    def clip(self, gradients: Iterable[Tensor], max_norm: float, fixed_norm: float | None = None) -> float:
        """Scale all ranks' gradients, of any shape, to a joint 2-norm of at most `max_norm`; returns that before, in
        whose place `fixed_norm` counts."""
        gradients = list(gradients)
        norm = self.joint_norm(self.squared_norms(gradients))
        counted = norm if fixed_norm is None else fixed_norm
        scale_down([local_tensor(gradient) for gradient in gradients], counted, max_norm)
        return norm

    @abstractmethod
    def parallelize(self, model: Decoder, wrapping: Wrapping) -> None:
        """Spread a model, or a stage of one, that has no memory yet, over the ranks."""

    @abstractmethod
    def local_slice(self, weight: Tensor) -> LocalSlice:
        """The piece of a weight, of any shape, that lies on this rank, and where it begins in the whole."""

    @abstractmethod
    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], slices: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """This rank's slices of `function` of whole matrices (N, R, C): see `core.optim.weight.WeightLayout`."""

    @abstractmethod
    def row_blocks(self, weight: Tensor, size: int) -> Tensor:
        """Zeros in fp32 for each block of `size` numbers in the rows of a weight (..., C), on the ranks with these."""

    @abstractmethod
    def pipeline(self, stages: dict[int, Decoder], n_microbatches: int) -> Pipeline | None:
        """What runs the stages of this rank, by their numbers; None where the model is in one piece."""


class SingleRank(RankView):
    """The layout of a process that nobody else works with."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Parallelism(), Degrees(), device)
        self.data_rank = self.pipeline_rank = 0
        self.is_first, self.gathers = True, False

    def sums(self, *values: float) -> list[float]:
        return list(values)

    def maxima(self, *values: float) -> list[float]:
        return list(values)

    def sum_of_data(self, value: float) -> float:
        return value

    def sum_counts(self, counts: list[Tensor]) -> None:
        pass

    def sum_gradients(self, stages: list[Decoder], *, now: bool) -> None:
        pass

    def measure_weights(self, stages: list[Decoder]) -> None:
        pass

    def let_go(self, stages: list[Decoder]) -> None:
        pass

    def join(self, found: dict[str, Any]) -> dict[str, Any]:
        return found

    def to_rank_tokens(self, batch: Batch, *, documents: bool, n_labels: int | None = None) -> Microbatch:
        return whole_rows(batch, self.device, documents=documents, n_labels=n_labels)

    def vocabulary(self, size: int) -> Vocabulary:
        return WholeVocabulary(size)

    def squared_norms(self, gradients: list[Tensor]) -> Tensor:
        return squared_norms(gradients)

    def joint_norm(self, squares: Tensor) -> float:
        return squares.sum().sqrt().item()

    def parallelize(self, model: Decoder, wrapping: Wrapping) -> None:
        wrapping.of_one_rank(model)

    def local_slice(self, weight: Tensor) -> LocalSlice:
        return full_slice(weight)

    def map_matrices(
        self, function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], slices: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        return (function(x) if x.dim() == 3 else function(x.unsqueeze(0)).squeeze(0) for x in slices)

    def row_blocks(self, weight: Tensor, size: int) -> Tensor:
        return weight.new_zeros((*weight.shape[:-1], -(-weight.shape[-1] // size)), dtype=torch.float32)

    def pipeline(self, stages: dict[int, Decoder], n_microbatches: int) -> None:
        return None


def whole_rows(batch: Batch, device: torch.device, *, documents: bool, n_labels: int | None = None) -> Microbatch:
    """A batch of which this rank computes all tokens.

    Where documents stand is found for every kernel, though `varlen` alone asks: 0.1 ms for 16,384 tokens.
    """
    counted = n_labels is None
    padding_BL = batch.padding_BL() if counted else None
    spanned = spans(batch.documents_BL) if documents and counted else None
    n_labels = count_labels(batch.labels_BL) if n_labels is None else n_labels
    batch = batch.map(lambda part: to_device(part, device))
    positions = Positions(batch.positions_BL, batch.documents_BL) if documents else Positions.rows(batch.tokens_BL)
    if padding_BL is not None:
        positions = positions._replace(padding_BL=to_device(padding_BL, device))
    if spanned is not None:
        positions = positions._replace(spans=(to_device(spanned[0], device), *spanned[1:]))
    return Microbatch(batch.tokens_BL, batch.labels_BL, positions, n_labels, batch.inputs)
