"""What a run will take of one of its ranks, worked out on a machine that could not hold it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from core.activation_checkpoint.survey import ranges
from core.config.errors import UserError, check_all
from core.nn.balance import routers
from core.nn.decoder import Decoder
from core.nn.kernel_checks import name_of, trains_on_cpu
from core.nn.weights import parameter_count, training_flops_per_token
from core.optim.groups import freeze
from core.parallel.settings import MOST_RANKS, Degrees, describe_degrees
from core.plan.fake_step import run_fake_step
from core.plan.sample_blocks import own_blocks
from core.plan.segments import total
from core.quantization.converter import converted_model
from core.runtime.device import GIB, MIB
from core.step.checks import Run, check_model, check_run, check_sizes


@dataclass(kw_only=True)
class Traffic:
    """What one kind of message makes a rank send in a step."""

    axis: str
    collective: str
    calls: int
    bytes: int


@dataclass(kw_only=True)
class Plan:
    """A run as one of its ranks sees it; numbers of bytes and FLOPs are this rank's, in one step."""

    recipe: str
    world_size: int
    rank: int
    mesh: dict[str, int]
    comm_backend: str
    """How tokens reach experts on other ranks."""
    model_parameters: int
    """Of the whole model."""
    stages: list[str]
    """The blocks of each stage on this rank; without a pipeline there is one stage."""
    rows: int
    """In a step, over all ranks."""
    seq_len: int
    microbatch_rows: int
    microbatches: int
    """Of this rank in a step."""
    weights_dtype: str
    compute_dtype: str
    activation_checkpoint: str
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    inputs_bytes: int
    """Tables and counters of the model, tokens, and what a pipeline receives in."""
    activations_bytes: int
    """The most at once of all that lives within a step but gradients of stored weights: what backward needs, gathered
    weights, gradients that are not summed yet, results on their way."""
    peak_bytes: int
    """The most of everything at once."""
    peak_at: str
    flops: int
    """Of matrix products and attention, those included that checkpointing repeats."""
    model_flops: int
    """This rank's share of those that the model needs, as utilisation counts them."""
    traffic: list[Traffic]
    notes: list[str]

    def __str__(self) -> str:
        parts = [self._head(), self._memory(), self._sent() if self.traffic else [], self._computed(), self.notes]
        return "\n\n".join("\n".join(part) for part in map(list, parts) if part)

    def _head(self) -> Iterator[str]:
        here = f"{self.parameters:,}, blocks {' and '.join(self.stages)}"
        batches = f"{self.microbatches:,} microbatch{'es' * (self.microbatches > 1)} of {self.microbatch_rows:,}"
        rows = {
            "mesh": describe_degrees(Degrees(**self.mesh), self.comm_backend),
            "model": f"{self.model_parameters:,} parameters; here {here}",
            "step": f"{self.rows:,} rows of {self.seq_len:,} tokens; here {batches}",
            "types": f"weights {self.weights_dtype}, compute {self.compute_dtype}",
            "backward": f"activation checkpoint {self.activation_checkpoint}",
        }
        yield f"{self.recipe or 'a run'}: rank {self.rank:,} of {self.world_size:,} in one step"
        yield ""
        for name, value in rows.items():
            yield f"{name:10}{value}"

    def _memory(self) -> Iterator[str]:
        unit, name = (GIB, "GiB") if self.peak_bytes >= GIB else (MIB, "MiB")
        yield f"{'memory':38}{name:>12}"
        for what, n_bytes in {
            "weights": self.weights_bytes,
            "gradients": self.gradients_bytes,
            "optimizer state": self.optimizer_bytes,
            "tables, tokens, receive buffers": self.inputs_bytes,
            "activations and gathered weights": self.activations_bytes,
        }.items():
            yield f"  {what:36}{n_bytes / unit:12.3f}"
        yield f"  {'peak of all':36}{self.peak_bytes / unit:12.3f}  in {self.peak_at}"

    def _sent(self) -> Iterator[str]:
        unit, name = (GIB, "GiB") if sum(part.bytes for part in self.traffic) >= GIB else (MIB, "MiB")
        yield f"{'sent':38}{name:>12}{'calls':>9}"
        for part in self.traffic:
            yield f"  {part.axis:18}{part.collective:18}{part.bytes / unit:12.3f}{part.calls:9,}"

    def _computed(self) -> Iterator[str]:
        unit, name = (1e12, "TFLOP") if self.flops >= 1e12 else (1e9, "GFLOP")
        yield f"{'computed':38}{name:>12}"
        yield f"  {'in all':36}{self.flops / unit:12.3f}"
        yield f"  {'needed by the model':36}{self.model_flops / unit:12.3f}"


def plan(run: Run, *, world_size: int | None, rank: int) -> Plan:
    """What `run` takes of `rank`; without `world_size` on as many ranks as its degrees ask for.

    Raises one `UserError` for everything that keeps the run from these ranks. Unless it asks for a CPU, the run is
    taken to be one on accelerators.
    """
    device = torch.device("cpu" if run.training.device == "cpu" else "cuda")
    check_sizes(run)
    if world_size is not None and world_size > MOST_RANKS:
        raise UserError(f"--world-size {world_size:,} must be at most {MOST_RANKS:,}")
    if world_size is None:
        world_size = run.parallelism.degrees(1).world
    model, conversions = converted_model(run.model, run.converters)
    freeze(model.named_parameters(), run.optimizer.groups)
    check_all(
        partial(check_run, run, world_size),
        partial(check_rank, rank, world_size),
        partial(check_model, model, run, device),
    )
    degrees = run.parallelism.degrees(world_size)
    training = run.training
    found = run_fake_step(run, world_size=world_size, rank=rank, device=device)
    step, stored = total(found.segments), found.stored
    n_rows = training.rows_per_step(degrees.data)
    inputs = stored.buffers + found.inputs
    return Plan(
        recipe=run.recipe,
        world_size=world_size,
        rank=rank,
        mesh=degrees._asdict(),
        comm_backend=run.parallelism.expert_parallel_comm_backend,
        model_parameters=parameter_count(model),
        stages=[ranges(blocks) or "none" for blocks in found.blocks],
        rows=n_rows,
        seq_len=training.seq_len,
        microbatch_rows=n_rows // degrees.data // found.n_microbatches,
        microbatches=found.n_microbatches,
        weights_dtype=training.dtype,
        compute_dtype=str(training.compute_dtype(device)).removeprefix("torch."),
        activation_checkpoint=run.activation_checkpoint.mode,
        parameters=stored.n_weights,
        weights_bytes=stored.weights,
        gradients_bytes=stored.gradients,
        optimizer_bytes=stored.optimizer,
        inputs_bytes=inputs,
        activations_bytes=step.peak_activations,
        peak_bytes=stored.weights + stored.optimizer + inputs + step.peak,
        peak_at=step.peak_at,
        flops=step.flops,
        model_flops=training_flops_per_token(model, training.seq_len).total * n_rows * training.seq_len // world_size,
        traffic=[
            Traffic(axis=kind.axis, collective=kind.collective, calls=step.calls[kind], bytes=n_bytes)
            for kind, n_bytes in sorted(step.sent.items(), key=lambda item: -item[1])
        ],
        notes=[*map(str, conversions), *notes(run, model, device)],
    )


def check_rank(rank: int, world_size: int) -> None:
    """Raise `UserError` for a rank that there is not."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is none of {world_size} ranks: use 0 to {world_size - 1}")


def notes(run: Run, model: Decoder, device: torch.device) -> Iterator[str]:
    """What the plan takes for granted, where that matters."""
    if device.type != "cpu":
        yield "activations are those of a CPU's kernels: fused ones of an accelerator keep less (norms in mode none)"
    if run.compile.takes("model"):
        yield "torch.compile is not rehearsed: it keeps less and computes the same"
    if run.activation_checkpoint.mode == "memory_budget":
        yield "memory_budget is torch.compile's choice: planned is mode none, of which it keeps a part"
    dtype = run.training.compute_dtype(device)
    attentions = [block.attention for block in own_blocks(model)]
    for name in sorted({name_of(each.kernel) for each in attentions if not trains_on_cpu(each, dtype)}):
        yield f"{name} attention is planned as sdpa on a CPU, tile by tile"
    if routers(model):
        yield "experts get equally many rows"
    if run.parallelism.expert_parallel_comm_backend != "standard":
        yield "tokens are planned as travelling to experts by all-to-all (standard)"
    if run.parallelism.cpu_offload:
        yield "cpu_offload: weights, gradients and optimizer state lie in the host's memory, all else on the device"
