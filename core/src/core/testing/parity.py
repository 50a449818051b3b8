"""Every layout computes what one rank computes: the comparison, number by number.

Letters: B rows, L length, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.comm.backend import dispatchers
from core.data.packing import IGNORE, PADDING, Batch
from core.nn.balance import balance_loss, routers
from core.nn.decoder import Decoder
from core.optim.adam import AdamW
from core.optim.optimizer import Optimizer
from core.parallel.apply import dtensor_slice
from core.parallel.layout import RankView, SingleRank, Wrapping
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.quantization.converter import Converter
from core.step.assemble import BuiltModel, assemble, compile_block
from core.step.loss import CrossEntropy, Loss
from core.step.objective import Objective
from core.step.update import train_step
from core.testing.ranks import run_ranks


@dataclass
class Case:
    """A model, a layout, and how a step is split."""

    model: Decoder.Config
    parallelism: Parallelism = field(default_factory=Parallelism)
    world_size: int = 1
    checkpoint: Literal["none", "full", "selective"] = "none"
    n_rows: int = 8
    length: int = 16
    local_batch_size: int = -1
    """Rows of a microbatch; -1 is all that a data rank reads."""
    empty_rows: int = 1
    """How many rows, from the first on, have no label that counts."""
    mask: Literal["causal", "document"] = "document"
    idle_experts: range = range(0)
    """Experts that no token chooses; their routers must have a bias on the choice."""
    compute_dtype: torch.dtype = torch.float32
    """What is computed in."""
    weights_dtype: torch.dtype = torch.float32
    """What weights are stored in."""
    compile: str | None = None
    """Backend of torch.compile; None leaves the blocks as they are."""
    loss: Loss.Config = field(default_factory=lambda: CrossEntropy.Config(chunk_tokens=24))
    optimizer: Optimizer.Config = field(default_factory=lambda: AdamW.Config(lr=1e-2, eps=1e-6))
    """With an eps above what is left of gradients that are 0 but for rounding (1e-10), which else move weights."""
    converters: list[Converter.Config] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """What the rows have beside tokens, (n_rows, ...) each."""


@dataclass
class StepResult:
    """What a step did, in whole tensors by name: the state before, gradients, and the state after."""

    loss: float
    grad_norm: float
    next_loss: float
    balance_loss: float
    start: dict[str, Tensor]
    gradients: dict[str, Tensor]
    counts: dict[str, Tensor]
    selection_bias: dict[str, Tensor]


def drawn_batch(config: Decoder.Config, n_rows: int, length: int, empty_rows: int = 1) -> Batch:
    """Rows of several documents; a fifth of the labels is ignored, and all of the first `empty_rows`; the last
    row ends in padding."""
    generator = torch.Generator().manual_seed(3)
    tokens_BL, labels_BL = torch.randint(config.vocab_size, (2, n_rows, length), generator=generator)
    labels_BL[torch.rand(n_rows, length, generator=generator) < 0.2] = IGNORE
    labels_BL[:empty_rows] = IGNORE
    begins_BL = torch.rand(n_rows, length, generator=generator) < 0.12
    begins_BL[:, 0] = False
    documents_BL = begins_BL.long().cumsum(1)
    documents_BL[-1, length - length // 4 :] = PADDING
    labels_BL[-1, length - length // 4 :] = IGNORE
    index_BL = torch.arange(length).expand(n_rows, length)
    first_BL = torch.where(begins_BL, index_BL, 0).cummax(1).values
    return Batch(tokens_BL, labels_BL, index_BL - first_BL, documents_BL)


def result_of(case: Case) -> StepResult:
    """One step of `case` on this rank, and the loss of a second one; every rank gets whole tensors."""
    device = torch.device("cpu")
    layout: RankView = SingleRank(device) if case.world_size == 1 else ManyRanks(case.parallelism, device)
    built = build_case(case, layout)
    settings = {"layout": layout, "dtype": case.compute_dtype, "mask": case.mask}
    return step_result(case, built, Objective(built.models, case.loss.build(), pipeline=built.pipeline, **settings))


def step_result(case: Case, built: BuiltModel, objective: Objective) -> StepResult:
    """One step of `case`, and the loss of a second one, by an objective for a model that was built for it."""
    layout = objective.layout
    optimizer = case.optimizer.build(weights=built.weights(), layout=layout)
    batches = batches_of(case, layout)
    start = {name: full(weight.detach()).clone() for name, weight in built.named_parameters()}
    step_once = partial(train_step, objective, optimizer, batches, lr_factor=1.0, max_norm=1.0, on_nonfinite="stop")
    info = step_once(step=1)
    (balance,) = layout.sums(sum(balance_loss(model) for model in built.models))
    scale = min(1.0 / (info.grad_norm + 1e-6), 1.0)
    gradients = {name: full(weight.grad) / scale for name, weight in built.named_parameters()}
    found = {name: router for model in built.models for name, router in routers(model).items()}
    counts = {name: router.tokens_E.clone() for name, router in found.items()}
    bias = {name: router.selection_bias.clone() for name, router in found.items() if router.selection_bias is not None}
    following = step_once(step=2)
    return StepResult(info.loss, info.grad_norm, following.loss, balance, start, gradients, counts, bias)


def build_case(case: Case, layout: RankView, change: Callable[[Wrapping], Wrapping] | None = None) -> BuiltModel:
    """This rank's part of the model, with a start that makes every weight matter; `change` may put something else
    around its blocks."""
    rows = case.n_rows // layout.degrees.data
    wrapping = Wrapping(
        compute_dtype=case.compute_dtype,
        checkpoint=ActivationCheckpoint.Config(mode=case.checkpoint).build(folder=Path()).apply,
        dispatcher=dispatchers(case.parallelism.expert_parallel_comm_backend, layout.device),
        compile_block=None if case.compile is None else partial(compile_block, backend=case.compile),
    )
    built = assemble(
        case.model,
        layout,
        wrapping if change is None else change(wrapping),
        dtype=case.weights_dtype,
        seed=7,
        groups=case.optimizer.groups,
        converters=case.converters,
        n_microbatches=rows // case.parallelism.pipeline_parallel_microbatch_size,
    )
    widen(built)
    for model in built.models:
        for router in routers(model).values() if case.idle_experts else ():
            assert router.selection_bias is not None, "a choice without a bias cannot be kept from an expert"
            router.selection_bias[list(case.idle_experts)] = -100.0
    return built


def batches_of(case: Case, layout: RankView) -> list[Batch]:
    """The microbatches of this rank."""
    n_data = layout.degrees.data
    local = case.n_rows // n_data if case.local_batch_size == -1 else case.local_batch_size
    whole = drawn_batch(case.model, case.n_rows, case.length, case.empty_rows)._replace(inputs=case.inputs)
    starts = range(layout.data_rank * local, case.n_rows, local * n_data)
    return [whole.rows(first, first + local) for first in starts]


def widen(built: BuiltModel) -> None:
    """Make the start matter more: biases and sinks that are not zero, norms that are not one."""
    for name, weight in built.named_parameters():
        if weight.dim() == 1 or name.endswith("bias"):
            piece = dtensor_slice(weight)
            generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
            noise = torch.randn(weight.shape, generator=generator) * 0.2
            with torch.no_grad():
                piece.value.add_(piece.of(noise))
        elif weight.is_floating_point():  # no byte of one in few bits is a number
            with torch.no_grad():
                dtensor_slice(weight).value.mul_(6.0)


def full(tensor: Tensor | None) -> Tensor:
    """The whole of a tensor that is spread over ranks."""
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def largest_differences(found: list[StepResult], expected: StepResult) -> dict[str, float]:
    """The largest difference of each kind over all ranks, relative to the largest number of its kind."""
    worst: dict[str, float] = {}

    def note(kind: str, difference: float, size: float) -> None:
        worst[kind] = max(worst.get(kind, 0.0), difference / max(size, 1e-30))

    gradients: set[str] = set()
    for result in found:
        note("loss", abs(result.loss - expected.loss), expected.loss)
        note("grad norm", abs(result.grad_norm - expected.grad_norm), expected.grad_norm)
        note("next loss", abs(result.next_loss - expected.next_loss), expected.next_loss)
        note("balance loss", abs(result.balance_loss - expected.balance_loss), expected.balance_loss)
        for name, value in result.start.items():
            note("start", (value - expected.start[name]).abs().max().item(), 1.0)
        for name, value in result.gradients.items():
            size = expected.gradients[name].abs().max().item()
            note("gradient", (value - expected.gradients[name]).abs().max().item(), size)
        for name, value in result.counts.items():
            note("counts", (value - expected.counts[name]).abs().max().item(), 1.0)
        for name, value in result.selection_bias.items():
            note("selection bias", (value - expected.selection_bias[name]).abs().max().item(), 1.0)
        gradients |= result.gradients.keys()
    assert gradients == expected.gradients.keys(), f"no rank has {expected.gradients.keys() - gradients}"
    return worst


def alone(case: Case) -> Case:
    """The same model and step on one rank."""
    return replace(case, parallelism=Parallelism(), world_size=1, compile=None, checkpoint="none")


def compare(case: Case, run: Callable[[Case], StepResult] = result_of, timeout_s: float = 120.0) -> dict[str, float]:
    """The largest differences between `case` on its ranks, each of which calls `run`, and one rank."""
    found = run_ranks(run, case.world_size, case, timeout_s=timeout_s)
    return largest_differences(found, result_of(alone(case)))
