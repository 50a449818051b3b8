"""One training step: microbatches, forward, backward, clip, update."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from core.config.errors import UserError
from core.data.packing import Batch
from core.nn.balance import routers, start_step, update_selection_bias
from core.optim.clip import cut_values
from core.optim.optimizer import Optimizer
from core.optim.weight import local_tensor
from core.parallel.layout import RankView
from core.runtime.activity import begin
from core.runtime.log import event
from core.step.in_backward import UpdateInBackward
from core.step.objective import Objective
from core.step.source_losses import StepSources
from core.step.spikes import SpikeDetector

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
    """Whether the step counted; false where it was left out because its numbers were not finite, or a spike."""
    validation_loss: float | None = None
    """The loss on held-out text, where it was measured after the step."""
    group_norms: Mapping[str, float] = MappingProxyType({})
    """The norms, before clipping, of groups of weights that are clipped by themselves, by their patterns."""


def train_step(
    objective: Objective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    lr_factor: float,
    max_norm: float,
    on_nonfinite: Literal["stop", "skip"],
    fixed_norm: float | None = None,
    max_value: float | None = None,
    spikes: SpikeDetector | None = None,
    sources: StepSources | None = None,
) -> StepInfo:
    """Accumulate the gradient of the mean loss over all valid tokens of all `batches`, clip it, and update once.

    The denominator is the step's, over all ranks and microbatches: the gradient does not depend on how the step is
    split. With `optimizer.in_backward` the weights are updated by backward. Raises `UserError` before any other update
    when the step has no valid token, or when its loss or gradient norm is not finite and `on_nonfinite` is "stop"; with
    "skip" the weights stay as they are, as in a step that is a spike to `spikes`. The losses of the `sources` of its
    rows are added up, unless it is left out.
    """
    begin(f"step {step}")
    layout = objective.layout
    n_valid = objective.n_valid(batches)
    if n_valid == 0:
        raise UserError(f"step {step}: none of its {len(batches)} microbatches has a token that counts for the loss")
    optimizer.zero_grad()
    for part in objective.stages:
        start_step(part, n_valid)
    layout.measure_weights(objective.stages)
    tallies = objective.tallies(sources)
    limits: dict[str, Any] = {"max_norm": max_norm, "fixed_norm": fixed_norm, "max_value": max_value}
    early = None
    if optimizer.config.in_backward:
        early = UpdateInBackward(optimizer, layout, step=step, lr_factor=lr_factor, **limits)
    with early or nullcontext():
        loss, total = layout.sums(*objective.accumulate(batches, n_valid, tallies))
    layout.sum_counts([router.tokens_E for part in objective.stages for router in routers(part).values()])
    norm, group_norms = (early.norm(), {}) if early else clip(optimizer, layout, **limits)
    info = StepInfo(step, loss, total, norm, updated=True, group_norms=group_norms)
    if not (math.isfinite(info.loss) and math.isfinite(info.grad_norm)):
        if on_nonfinite == "stop":
            raise not_finite(info, updated=early is not None)
        return left_out(info, f"loss {info.loss}, gradient norm {info.grad_norm}", spikes)
    if spikes is not None and (spike := spikes.spike(info.loss, info.grad_norm)):
        return left_out(info, spike, spikes)
    optimizer.step(lr_factor, step)
    for part in objective.stages:
        update_selection_bias(part)
    if sources is not None:
        sources.add(tallies, batches)
    return info


def not_finite(info: StepInfo, *, updated: bool) -> UserError:
    """What is said of a step whose numbers are not finite, by which backward has updated weights or not."""
    found = f"step {info.step}: loss {info.loss}, gradient norm {info.grad_norm}"
    if updated:
        return UserError(
            f"{found}: stopped, after the update in backward; lower optimizer.lr and go on from a checkpoint"
        )
    return UserError(
        f"{found}: stopped before the update; lower optimizer.lr, or override this with --debug.on_nonfinite skip"
    )


def clip(
    optimizer: Optimizer, layout: RankView, *, max_norm: float, fixed_norm: float | None, max_value: float | None
) -> tuple[float, dict[str, float]]:
    """Clip the gradients of a step; returns the joint norm of all of them before, and those of groups that are clipped
    by themselves, by their patterns."""
    norms = {
        group.pattern: layout.clip(optimizer.gradients(group), group.max_norm)
        for group in optimizer.config.groups
        if group.max_norm is not None
    }
    rest = layout.clip(optimizer.gradients(), max_norm, fixed_norm)
    if max_value is not None:
        cut_values([local_tensor(gradient) for gradient in optimizer.gradients()], max_value)
    return (math.hypot(rest, *norms.values()) if norms else rest), norms


def left_out(info: StepInfo, reason: str, spikes: SpikeDetector | None) -> StepInfo:
    """What a step did that changes no weight, which is told and counted."""
    log.warning(f"step {info.step} left out: {reason}", extra=event("skipped", info.step))
    if spikes is not None:
        spikes.skipped += 1
    return info._replace(updated=False)
