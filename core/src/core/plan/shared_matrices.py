"""What an update does to whole matrices, recorded once for equal ones and counted for each: a plan may have thousands.

Letters: N matrices of a stack, R rows, C columns.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from core.optim.weight import WeightLayout
from core.plan.segments import Recorder

Update = Callable[[Tensor], Tensor]


class SharedMatrices:
    """The layout of a planned run, as its optimizer sees it."""

    recorder: Recorder
    """What counts the step that runs."""

    def __init__(self, layout: WeightLayout) -> None:
        self.layout, self.local_slice, self.row_blocks = layout, layout.local_slice, layout.row_blocks

    def map_matrices(self, function: Update, weights: Sequence[Tensor], slices: Sequence[Tensor]) -> Iterator[Tensor]:
        """As the layout does, of matrices (R, C) or stacks (N, R, C); `function` runs for the first of equal ones."""
        return self.layout.map_matrices(recorded_once(function, self.recorder), weights, slices)


def recorded_once(function: Update, recorder: Recorder) -> Update:
    """`function` of fake matrices (N, R, C), which have no numbers: of those that are like earlier ones it is not
    called, and its operations, and the most that it makes, are counted again."""
    known: dict[tuple, tuple[int, int]] = {}

    def recorded(x_NRC: Tensor) -> Tensor:
        kind = (x_NRC.shape, x_NRC.stride(), x_NRC.dtype)
        before = recorder.alive
        if kind in known:
            flops, rise = known[kind]
            recorder.flops += flops
            recorder.peak = max(recorder.peak, before + rise)
            return torch.empty_like(x_NRC)
        flops, peak = recorder.flops, recorder.peak
        recorder.peak = before
        done = function(x_NRC)
        known[kind] = recorder.flops - flops, recorder.peak - before
        recorder.peak = max(recorder.peak, peak)
        return done

    return recorded
