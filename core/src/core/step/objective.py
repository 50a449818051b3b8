"""What a step lowers and validation measures: the loss of batches, and its gradient."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.config.errors import UserError
from core.data.packing import IGNORE, Batch, count_labels
from core.nn.decoder import Decoder, HeadReader
from core.nn.kernel import Positions
from core.nn.layers import Head
from core.parallel.layout import RankView
from core.parallel.pipeline import Microbatch, Pipeline
from core.step.loss import Loss
from core.step.source_losses import StepSources, Tally


class BatchLoss(NamedTuple):
    """Nats of a batch, summed over its valid tokens and divided by a number: `main` of the next token, which is what is
    reported, and `total`, with the weighted losses of further predictions, which is what training lowers.
    """

    main: Tensor
    total: Tensor


class Objective:
    """The loss of batches: what training lowers and validation measures. Each rank has its own tokens' part of it.

    `stages` is the model, or the stages of it that this rank runs under `pipeline`. `mask` "document" lets tokens see
    only their own document and counts positions inside it; "causal" reads a row as one document. `dtype` is the type
    that matrix products compute in.
    """

    def __init__(
        self,
        stages: list[Decoder],
        loss: Loss,
        *,
        layout: RankView,
        dtype: torch.dtype,
        mask: Literal["causal", "document"],
        pipeline: Pipeline | None = None,
    ) -> None:
        self.stages, self.layout, self.dtype, self.mask, self.pipeline = stages, layout, dtype, mask, pipeline
        self.loss, self.vocabulary = loss, layout.vocabulary(stages[0].config.vocab_size)

    def n_valid(self, batches: Sequence[Batch]) -> float:
        """The labels that count in a step of which this rank has `batches`, by which its loss is divided."""
        return self.layout.sum_of_data(valid_tokens(batches))

    def accumulate(
        self, batches: Sequence[Batch], n_valid: float, tallies: Sequence[Tally] = ()
    ) -> tuple[float, float]:
        """Add to the gradients those of the loss divided by `n_valid`; returns its main and total part on this rank.

        `tallies`, if any, are one for each microbatch (`self.tallies`), and get its losses.
        """
        if self.pipeline is not None:
            left = iter(tallies)  # readers are made in the order of the microbatches
            losses = self.pipeline.run(
                self._microbatches(batches),
                lambda batch: self.reader(batch, n_valid, tally=next(left, None)),
                backward=True,
            )
            main = math.fsum(loss.item() for loss in losses)
            return main, main
        sums = torch.zeros(2, device=self.layout.device)
        for number, batch in enumerate(batches, start=1):
            self.layout.sum_gradients(self.stages, now=number == len(batches))
            loss = self(batch, n_valid, tally=tallies[number - 1] if tallies else None)
            loss.total.backward()
            sums += torch.stack(loss).detach()
        main, total = sums.tolist()
        return main, total

    def tallies(self, sources: StepSources | None) -> list[Tally]:
        """A tally for each microbatch of a step; nothing where its rows are of one source."""
        if sources is None:
            return []
        size = None if self.pipeline is None else self.layout.settings.pipeline_parallel_microbatch_size
        return sources.tallies(size, self.layout.device)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """This rank's part of the main loss of `batches`."""
        self.layout.measure_weights(self.stages)
        if self.pipeline is not None:
            losses = self.pipeline.run(self._microbatches(batches), self.reader, backward=False)
            return math.fsum(loss.item() for loss in losses)
        return math.fsum(self(batch).main.item() for batch in batches)

    def __call__(
        self, batch: Batch, n_valid: float = 1, *, n_labels: int | None = None, tally: Tally | None = None
    ) -> BatchLoss:
        """The loss, divided by `n_valid`, of a batch that this rank computes from embedding to head.

        `n_labels` is for fake tensors: see `RankView.to_rank_tokens`.
        """
        (model,) = self.stages
        microbatch = self.layout.to_rank_tokens(batch, documents=self.mask == "document", n_labels=n_labels)
        with self.precision():
            reader = self.reader(microbatch, n_valid, tally)
            losses = model(microbatch.tokens_BL, microbatch.positions, reader, **microbatch.inputs)
            if isinstance(losses, Tensor):
                return BatchLoss(losses, losses)
            total = losses.main
            for loss in losses.further:
                total = total + loss
            return BatchLoss(losses.main, total)

    def reader(self, batch: Microbatch, n_valid: float = 1, tally: Tally | None = None) -> HeadReader:
        """What the model is to make of its residual stream: the summed loss of `batch`, divided by `n_valid`; that of
        further tokens with its weight. `tally` gets the losses of the next token, of the last reading.
        """
        config = self.stages[0].config

        def read(x_BLD: Tensor, head: Head, depth: int) -> Tensor:
            labels_BL = labels_ahead(batch.labels_BL, depth, batch.positions) if depth else batch.labels_BL
            weight = config.mtp_loss_weight / config.n_mtp_layers if depth else 1.0
            scale = weight / n_valid  # known to the forward, which computes the gradient
            own = tally if depth == 0 else None
            if own is not None:
                own.nats_S.zero_()  # a pipeline has read a first microbatch before, for its shapes
            return self.loss(x_BLD, labels_BL, head, self.vocabulary, n_labels=batch.n_labels, scale=scale, tally=own)

        return read

    def _microbatches(self, batches: Sequence[Batch]) -> list[Microbatch]:
        size = self.layout.settings.pipeline_parallel_microbatch_size
        if any(batch.inputs for batch in batches):
            raise UserError("a pipeline hands on no inputs beside tokens: set parallelism.pipeline_parallel_degree 1")
        starts = ((batch, first) for batch in batches for first in range(0, len(batch.tokens_BL), size))
        rows = (batch.rows(first, first + size) for batch, first in starts)
        return [self.layout.to_rank_tokens(row, documents=self.mask == "document") for row in rows]

    def precision(self) -> AbstractContextManager:
        """Autocast without its cache, which would keep a copy of every weight until the forward ends.

        Weights that are gathered for a forward come in the right type already.
        """
        if self.dtype.itemsize >= 4 or self.layout.gathers:
            return nullcontext()
        return torch.autocast(self.layout.device.type, self.dtype, cache_enabled=False)


def labels_ahead(labels_BL: Tensor, k: int, positions: Positions) -> Tensor:
    """The labels k tokens further on; none where the row ends before, or `positions` has another document there."""
    ahead_BL = labels_BL.roll(-k, dims=1)
    ahead_BL[:, -k:] = IGNORE
    if positions.document_BL is not None:
        other_BL = positions.document_BL != positions.document_BL.roll(-k, dims=1)
        ahead_BL = ahead_BL.masked_fill(other_BL, IGNORE)
    return ahead_BL


def valid_tokens(batches: Sequence[Batch]) -> int:
    """Number of labels that count for the loss."""
    return sum(count_labels(batch.labels_BL) for batch in batches)
