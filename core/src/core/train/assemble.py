"""A model put together: built without memory, spread over ranks, given memory, started."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from core.comm.backend import dispatchers
from core.nn.balance import balance_loss, layer_loads, load_metrics
from core.nn.decoder import Decoder
from core.nn.dispatch import Dispatcher
from core.nn.init import init_weights, materialise
from core.nn.module import weights
from core.parallel.layout import Alone, Layout
from core.parallel.pipeline import Pipeline, cut_stage, split, stages_of
from core.parallel.settings import Parallelism


class Parts(NamedTuple):
    """The model, or the stages of it that this rank holds and the pipeline that runs them."""

    models: list[Decoder]
    pipeline: Pipeline | None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for model in self.models:
            yield from model.named_parameters()


def assemble(
    config: Decoder.Config,
    layout: Layout,
    *,
    checkpoint: Callable[[Decoder], None],
    compile_block: Callable[[nn.Module], None] | None,
    dispatcher: Callable[[ProcessGroup], Dispatcher],
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    seed: int,
    n_microbatches: int,
) -> Parts:
    """The parts of this rank, their weights drawn by (seed, name), equal in every layout.

    `n_microbatches` is how many travel a pipeline per step. Weights are stored in `dtype`.
    """
    settings = layout.settings
    piped = layout.degrees.pipeline > 1
    stages = split(settings, config.n_layers) if piped else []
    numbers = stages_of(layout.pipeline_rank, settings, config.n_layers) if piped else [0]
    models = {}
    for number in numbers:
        with torch.device("meta"):
            model: Decoder = config.build()
        if piped:
            cut_stage(model, stages, number)
        layout.parallelize(
            model,
            dispatcher=dispatcher,
            checkpoint=checkpoint,
            compile_block=compile_block,
            compute_dtype=compute_dtype,
        )
        weights_on = torch.device("cpu") if settings.cpu_offload else None
        materialise(model, layout.device, dtype, weights_on=weights_on)
        init_weights(((w.name, w.value, w.start) for w in weights(model)), seed, layout.own)
        models[number] = model
    pipeline = layout.pipeline(models, n_stages=len(stages), n_microbatches=n_microbatches)
    return Parts(list(models.values()), pipeline)


def expert_loads(models: list[Decoder], layout: Layout) -> dict[str, float]:
    """How evenly the experts of all layers were loaded in the last step, as metrics; every rank must ask."""
    loads = layout.join({name: load for model in models for name, load in layer_loads(model).items()})
    (balance,) = layout.sums(sum(balance_loss(model) for model in models))
    return load_metrics(loads, balance)


def make_layout(parallelism: Parallelism, device: torch.device) -> Layout:
    """The layout of the process group, or of a process alone."""
    if not dist.is_initialized():
        return Alone(device)
    from core.parallel.spread import Spread  # loads torch.distributed.tensor: a second that a process alone saves

    return Spread(parallelism, device)


def make_dispatcher(parallelism: Parallelism, device: torch.device) -> Callable[[ProcessGroup], Dispatcher]:
    """What gives each process group of experts its dispatcher. Raises `UserError` when the backend cannot run."""
    factor = parallelism.hybridep_non_blocking_expert_capacity_factor
    return dispatchers(parallelism.expert_parallel_comm_backend, device, capacity_factor=factor)


def compile_block(block: torch.nn.Module, backend: str) -> None:
    """Let torch.compile have a block, in one graph; numbers that the host reads, such as rows to send, stay in it."""
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    block.compile(backend=backend, fullgraph=True)
