"""One training step: microbatches, forward, backward, clip, update."""

import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from core.config.errors import UserError
from core.data.packing import Batch
from core.nn.balance import routers, start_step, update_selection_bias
from core.optim.optimizer import Optimizer
from core.runtime.activity import begin
from core.step.objective import Objective, valid_tokens

log = logging.getLogger("armature")


class StepInfo(NamedTuple):
    """What one step did, the same on all ranks."""

    step: int
    """Its number, counted from 1."""
    loss: float
    """Mean in nats over the step's valid tokens, of the next token."""
    total_loss: float
    """With the weighted losses of further predictions."""
    grad_norm: float
    """Before clipping."""
    updated: bool
    """Whether the step counted; false where it was left out because its numbers were not finite."""
    validation_loss: float | None = None
    """The loss on held-out text, where it was measured after the step."""


def train_step(
    objective: Objective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    lr_factor: float,
    max_norm: float,
    on_nonfinite: Literal["stop", "skip"],
) -> StepInfo:
    """Accumulate the gradient of the mean loss over all valid tokens of all `batches`, clip it, and update once.

    The denominator is the step's, over all ranks and microbatches: the gradient does not depend on how the step is
    split. Raises `UserError` before any update when the step has no valid token, or when its loss or gradient norm is
    not finite and `on_nonfinite` is "stop"; with "skip" the weights stay as they are.
    """
    begin(f"step {step}")
    layout = objective.layout
    n_valid = layout.sum_of_data(valid_tokens(batches))
    if n_valid == 0:
        raise UserError(f"step {step}: none of its {len(batches)} microbatches has a token that counts for the loss")
    optimizer.zero_grad()
    for part in objective.stages:
        start_step(part, n_valid)
    loss, total = layout.sums(*objective.accumulate(batches, n_valid))
    layout.sum_counts([router.tokens_E for part in objective.stages for router in routers(part).values()])
    info = StepInfo(step, loss, total, layout.clip(optimizer.gradients(), max_norm), updated=True)
    if not (math.isfinite(info.loss) and math.isfinite(info.grad_norm)):
        if on_nonfinite == "stop":
            raise UserError(
                f"step {step}: loss {info.loss}, gradient norm {info.grad_norm}: stopped before the update; "
                "lower optimizer.lr, or override this with --debug.on_nonfinite skip"
            )
        log.warning(f"step {step} left out: loss {info.loss}, gradient norm {info.grad_norm}")
        return info._replace(updated=False)
    optimizer.step(lr_factor, step)
    for part in objective.stages:
        update_selection_bias(part)
    return info
