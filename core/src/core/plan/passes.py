"""What does the passes of a rank's step one by one: the model in one piece, or the stages of a pipeline.

Letters: B rows, L length, D width.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from core.data.packing import Batch
from core.nn.decoder import Decoder
from core.parallel.layout import RankView
from core.plan.pipeline_passes import Action, PipelinePasses
from core.step.objective import BatchLoss, Objective
from core.step.settings import Training


class Passes(Protocol):
    """Does the passes of a step, each with the same microbatch."""

    order: list[Action]
    """All of them."""
    n_microbatches: int

    def run(self, action: Action) -> int:
        """Do one; returns the bytes that other stages are sent."""
        ...

    def end(self) -> None:
        """Let go of what is held until the last."""
        ...


class WholeModel:
    """The passes of a model in one piece; the methods are those of `Passes`."""

    def __init__(self, objective: Objective, batch: Batch, n_microbatches: int) -> None:
        self.objective, self.batch, self.n_microbatches = objective, batch, n_microbatches
        self.order = [Action(kind, 0, i) for i in range(n_microbatches) for kind in ("F", "B")]
        self.loss: BatchLoss | None = None

    def run(self, action: Action) -> int:
        objective = self.objective
        if action.kind == "F":
            objective.layout.sum_gradients(objective.stages, now=action.microbatch == self.n_microbatches - 1)
            self.loss = objective(self.batch, n_labels=self.batch.labels_BL.numel())
        else:
            assert self.loss is not None
            self.loss.total.backward()
        return 0

    def end(self) -> None:
        self.loss = None


def passes_of(
    training: Training,
    layout: RankView,
    models: dict[int, Decoder],
    objective: Objective,
    inputs: Callable[[int, int], Mapping[str, torch.Tensor]],
) -> Passes:
    """What does the passes of these stages, by their numbers, or of the model. `inputs` has what so many rows
    of this length have beside their tokens, (B, ...) each."""
    degrees, settings = layout.degrees, layout.settings
    piped = degrees.pipeline > 1
    n_rows = training.rows_per_step(degrees.data) // degrees.data
    n_each = settings.pipeline_parallel_microbatch_size if piped else training.local_batch_size
    batch = Batch(
        *torch.zeros(4, n_each, training.seq_len, dtype=torch.int64).unbind(), inputs=inputs(n_each, training.seq_len)
    )
    if not piped:
        return WholeModel(objective, batch, n_rows // n_each)
    pipeline = layout.pipeline(models, n_rows // n_each)
    assert pipeline is not None
    microbatch = layout.to_rank_tokens(batch, documents=objective.mask == "document", n_labels=batch.labels_BL.numel())
    (dim,) = {model.config.dim for model in models.values()}
    length = microbatch.tokens_BL.shape[1] // degrees.tensor
    residual_BLD = torch.zeros(n_each, length, dim, dtype=objective.dtype, requires_grad=True)
    return PipelinePasses(pipeline, microbatch, objective.reader(microbatch), residual_BLD)
