"""Whether a run can fit, asked before anything is allocated, and what would help where it does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from typing import NamedTuple

import torch
from torch import nn

from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.nn.weights import weights
from core.optim.optimizer import Optimizer
from core.parallel.layout import SingleRank
from core.parallel.settings import Degrees
from core.runtime.device import free_memory
from core.runtime.launcher import World
from core.runtime.units import size_text
from core.step.checks import Run
from core.step.in_backward import in_backward_problems
from core.step.loss import Loss
from core.step.settings import Training


class Estimate(NamedTuple):
    """Bytes that a run needs whatever else it does: a lower bound, without the activations of the blocks."""

    weights: int
    gradients: int
    optimizer: int
    loss: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size_text(value)}" for name, value in self._asdict().items())
        return f"{size_text(self.total)} ({parts})"


def estimate(
    model: Decoder,
    optimizer: Optimizer.Config,
    loss: Loss.Config,
    training: Training,
    degrees: Degrees | None = None,
) -> Estimate:
    """What one rank needs: weights in `training.dtype` or bytes; of those that are trained the gradients, or the
    largest one where backward frees them, and what the optimizer keeps; and what the loss of one microbatch holds."""
    degrees = degrees or Degrees()
    n_cut, dtype = degrees.world // degrees.replicate, getattr(torch, training.dtype)
    sizes = (each.numel() * (dtype if each.is_floating_point() else each.dtype).itemsize for each in model.parameters())
    stored = sum(sizes) // n_cut
    typed = [
        each._replace(value=nn.Parameter(each.value.to(dtype), each.value.requires_grad)) for each in weights(model)
    ]
    updates: Optimizer = optimizer.build(weights=typed, layout=SingleRank(torch.device("meta")))
    gradients = (weight.parameter.nbytes for weight in updates.weights.values())
    gradients = (max(gradients) if optimizer.in_backward else sum(gradients)) // n_cut
    kept = sum(tensor.nbytes for tensors in updates.state.values() for tensor in tensors.values()) // n_cut
    n_tokens = training.local_batch_size * training.seq_len // (degrees.context * degrees.pipeline)
    sizes = {"dim": model.config.dim, "vocab_size": model.config.vocab_size, "n_ranks": degrees.tensor}
    return Estimate(stored, gradients, kept, loss.least_bytes(n_tokens, **sizes))


def check_memory(model: Decoder, run: Run, device: torch.device, world: World) -> None:
    """Raise `UserError` with both numbers and what would help when a run needs more than the free memory of `device`; a
    CPU's is shared by all ranks on its machine."""
    degrees = run.parallelism.degrees(world.size)
    need = estimate(model, run.optimizer, run.loss, run.training, degrees)
    n_sharing = world.local_size if device.type == "cpu" else 1
    free = free_memory(device)
    free = None if free is None else free // n_sharing
    if free is None or need.total <= free:
        return
    each = " for each rank" if n_sharing > 1 else ""
    helps = _what_helps(run, degrees)
    raise UserError(f"the run needs at least {need} and {device} has {size_text(free)} free{each}. {helps}")


@contextmanager
def memory_advice(device: torch.device, run: Run, degrees: Degrees) -> Iterator[None]:
    """Where `device` runs out of memory while the block runs, a `UserError` says what would help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        full = run.activation_checkpoint.mode == "full"
        less = "" if full else "; --activation_checkpoint.mode full (blocks keep their input alone)"
        raise UserError(f"{device} ran out of memory: {error}\n{_what_helps(run, degrees)}{less}") from error


def _what_helps(run: Run, degrees: Degrees) -> str:
    training, helps = run.training, []
    if training.local_batch_size > 1:
        rows = training.rows_per_step(degrees.data)
        helps.append(f"--training.local_batch_size 1 --training.global_batch_size {rows} (the same steps, row by row)")
    helps.append("a lower --training.seq_len")
    if training.dtype == "float32":
        helps.append("--training.dtype bfloat16 (weights, gradients and moments halve)")
    if run.optimizer.state_dtype == "weights":
        helps.append("--optimizer.state_dtype 8-bit (moments take a quarter of those in float32)")
    early = replace(run.optimizer, in_backward=True), replace(training, max_norm=inf)
    refused = list(in_backward_problems(*early, run.parallelism, run.debug, degrees))
    if not refused and not run.optimizer.in_backward:
        norm = " --training.max_norm inf" if training.fixed_norm is None else ""
        helps.append(f"--optimizer.in_backward{norm} (gradients are freed as they come)")
    helps.append("a smaller recipe (the debug recipe fits everywhere) or a device with more memory")
    return f"What would help: {'; '.join(helps)}"
