"""One training step: microbatches, forward, backward, clip, update."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core.config.errors import UserError
from core.data.packing import IGNORE, Batch
from core.nn.balance import start_step, update_selection_bias
from core.nn.decoder import Decoder
from core.nn.kernel import Where
from core.optim.clip import clip_gradients
from core.optim.optimizer import Optimizer


class Loss(NamedTuple):
    """Nats of a batch, summed over its valid tokens: `main` of the next token, which is what is reported, and `total`,
    with the weighted losses of further predictions, which is what training lowers.
    """

    main: Tensor
    total: Tensor


class Objective:
    """The loss of a batch: what training lowers and validation measures.

    `mask` "document" lets tokens see only their own document and counts positions inside it; "causal" reads a row as
    one document. `dtype` is the type that matrix products compute in.
    """

    def __init__(
        self,
        model: Decoder,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        mask: Literal["causal", "document"],
    ) -> None:
        self.model, self.loss, self.device, self.dtype, self.mask = model, loss, device, dtype, mask

    def __call__(self, batch: Batch) -> Loss:
        tokens, labels = (t.to(self.device, non_blocking=True) for t in (batch.tokens_BL, batch.labels_BL))
        where = None
        if self.mask == "document":
            where = Where(batch.positions_BL.to(self.device), batch.documents_BL.to(self.device))
        with self._precision():
            predictions = self.model(tokens, where)
            if isinstance(predictions, Tensor):
                loss = self.loss(predictions, labels)
                return Loss(loss, loss)
            main = self.loss(predictions.logits_BLV, labels)
            further = torch.zeros_like(main)
            for k, logits_BLV in enumerate(predictions.further, start=1):
                further = further + self.loss(logits_BLV, labels_ahead(labels, k, where))
            return Loss(main, main + self.model.config.mtp_loss_weight / len(predictions.further) * further)

    def _precision(self) -> AbstractContextManager:
        """Autocast without its cache, which would keep a copy of every weight until the forward ends."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)


def labels_ahead(labels_BL: Tensor, k: int, where: Where | None) -> Tensor:
    """The labels k places further on; none where the row ends before, or where `where` has another document there."""
    ahead_BL = labels_BL.roll(-k, dims=1)
    ahead_BL[:, -k:] = IGNORE
    if where is not None and where.document_BL is not None:
        other_BL = where.document_BL != where.document_BL.roll(-k, dims=1)
        ahead_BL = ahead_BL.masked_fill(other_BL, IGNORE)
    return ahead_BL


class StepInfo(NamedTuple):
    """What one step did: mean loss in nats over its valid tokens, the norm before clipping, and whether it counted."""

    loss: float
    grad_norm: float
    updated: bool


def valid_tokens(batches: Sequence[Batch]) -> int:
    """Number of labels that count for the loss."""
    return sum(int((batch.labels_BL != IGNORE).sum()) for batch in batches)


def train_step(
    objective: Objective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    max_norm: float,
    on_nonfinite: Literal["stop", "skip"],
) -> StepInfo:
    """Accumulate the gradient of the mean loss over all valid tokens of all `batches`, clip it, and update once.

    The denominator is the step's, not a microbatch's: the gradient does not depend on how the step is split.
    Raises `UserError` before any update when the step has no valid token, or when its loss or gradient norm is not
    finite and `on_nonfinite` is "stop"; with "skip" the weights stay as they are.
    """
    n_valid = valid_tokens(batches)
    if n_valid == 0:
        raise UserError(f"step {step}: none of its {len(batches)} microbatches has a token that counts for the loss")
    optimizer.zero_grad()
    start_step(objective.model, n_valid)
    total = torch.zeros((), device=objective.device)
    for batch in batches:
        loss = objective(batch)
        (loss.total / n_valid).backward()
        total += loss.main.detach() / n_valid
    norm = clip_gradients(optimizer.gradients(), max_norm)
    info = StepInfo(total.item(), norm.item(), updated=True)
    if not (math.isfinite(info.loss) and math.isfinite(info.grad_norm)):
        if on_nonfinite == "stop":
            raise UserError(
                f"step {step}: loss {info.loss}, gradient norm {info.grad_norm}: stopped before the update; "
                "lower optimizer.lr, or insist with --debug.on_nonfinite skip"
            )
        return info._replace(updated=False)
    optimizer.step(lr)
    update_selection_bias(objective.model)
    return info
