"""What a step lowers and validation measures: the loss of batches, and its gradient."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.data.packing import IGNORE, Batch
from core.nn.decoder import Decoder
from core.nn.kernel import Where
from core.parallel.layout import Layout
from core.parallel.pipeline import Microbatch, Pipeline


class Loss(NamedTuple):
    """Nats of a batch, summed over its valid tokens: `main` of the next token, which is what is reported, and `total`,
    with the weighted losses of further predictions, which is what training lowers.
    """

    main: Tensor
    total: Tensor


class Objective:
    """The loss of batches: what training lowers and validation measures. Each rank has its own tokens' part of it.

    `parts` is the model, or the stages of it that this rank runs under `pipeline`. `mask` "document" lets tokens see
    only their own document and counts positions inside it; "causal" reads a row as one document. `dtype` is the type
    that matrix products compute in.
    """

    def __init__(
        self,
        parts: list[Decoder],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        layout: Layout,
        dtype: torch.dtype,
        mask: Literal["causal", "document"],
        pipeline: Pipeline | None = None,
    ) -> None:
        self.parts, self.layout, self.dtype, self.mask, self.pipeline = parts, layout, dtype, mask, pipeline
        self.loss = layout.loss(loss, parts[0].config.vocab_size)

    def accumulate(self, batches: Sequence[Batch], n_valid: float) -> tuple[float, float]:
        """Add to the gradients those of the loss divided by `n_valid`; gives this rank's part of it, main and total."""
        if self.pipeline is not None:
            losses = self.pipeline.run(self._microbatches(batches), self._share(n_valid), backward=True)
            main = math.fsum(loss.item() for loss in losses)
            return main, main
        sums = torch.zeros(2, device=self.layout.device)
        for number, batch in enumerate(batches, start=1):
            self.layout.sum_gradients(self.parts, now=number == len(batches))
            loss = self(batch)
            (loss.total / n_valid).backward()
            sums += torch.stack(loss).detach() / n_valid
        main, total = sums.tolist()
        return main, total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """This rank's part of the main loss of `batches`."""
        if self.pipeline is not None:
            losses = self.pipeline.run(self._microbatches(batches), self._share(1), backward=False)
            return math.fsum(loss.item() for loss in losses)
        return math.fsum(self(batch).main.item() for batch in batches)

    def __call__(self, batch: Batch) -> Loss:
        """The loss of a batch that this rank computes from embedding to head."""
        (model,) = self.parts
        tokens_BL, labels_BL, where = self.layout.place(batch, documents=self.mask == "document")
        with self._precision():
            predictions = model(tokens_BL, where)
            if isinstance(predictions, Tensor):
                loss = self.loss(predictions, labels_BL)
                return Loss(loss, loss)
            main = self.loss(predictions.logits_BLV, labels_BL)
            further = torch.zeros_like(main)
            for k, logits_BLV in enumerate(predictions.further, start=1):
                further = further + self.loss(logits_BLV, labels_ahead(labels_BL, k, where))
            return Loss(main, main + model.config.mtp_loss_weight / len(predictions.further) * further)

    def _microbatches(self, batches: Sequence[Batch]) -> list[Microbatch]:
        size = self.layout.settings.pipeline_parallel_microbatch_size
        rows = (Batch(*parts) for batch in batches for parts in zip(*(part.split(size) for part in batch), strict=True))
        return [Microbatch(*self.layout.place(row, documents=self.mask == "document")) for row in rows]

    def _share(self, n_valid: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits_BLV, labels_BL: self.loss(logits_BLV, labels_BL) / n_valid

    def _precision(self) -> AbstractContextManager:
        """Autocast without its cache, which would keep a copy of every weight until the forward ends.

        Weights that are gathered for a forward come in the right type already.
        """
        if self.dtype == torch.float32 or self.layout.gathers:
            return nullcontext()
        return torch.autocast(self.layout.device.type, self.dtype, cache_enabled=False)


def labels_ahead(labels_BL: Tensor, k: int, where: Where) -> Tensor:
    """The labels k places further on; none where the row ends before, or where `where` has another document there."""
    ahead_BL = labels_BL.roll(-k, dims=1)
    ahead_BL[:, -k:] = IGNORE
    if where.document_BL is not None:
        other_BL = where.document_BL != where.document_BL.roll(-k, dims=1)
        ahead_BL = ahead_BL.masked_fill(other_BL, IGNORE)
    return ahead_BL


def valid_tokens(batches: Sequence[Batch]) -> int:
    """Number of labels that count for the loss."""
    return sum(int((batch.labels_BL != IGNORE).sum()) for batch in batches)
