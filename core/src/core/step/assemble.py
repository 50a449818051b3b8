"""A model put together: built without memory, spread over ranks, given memory, started."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from core.comm.backend import dispatchers
from core.comm.transport import Sizes
from core.nn.balance import balance_loss, layer_loads, load_metrics
from core.nn.decoder import Decoder
from core.nn.dispatch import Dispatcher
from core.nn.init import init_weights, materialise
from core.nn.weights import Weight, weights
from core.optim.groups import Group, freeze
from core.parallel.layout import RankView, SingleRank, Wrapping
from core.parallel.pipeline import Pipeline, cut_stage, split_layers, stages_of
from core.parallel.settings import Parallelism
from core.quantization.converter import Converter, converted_model
from core.runtime.activity import working
from core.step.checks import Run, expert_parts
from core.step.compiler import skip_vector_trials
from core.step.settings import Compile

KINDS_OF_BLOCK = 8
"""As often may torch.compile compile the blocks of a model, of other kinds or for other rows: PyTorch's own limit."""


class BuiltModel(NamedTuple):
    """The model, or the stages of it that this rank holds and the pipeline that runs them."""

    models: list[Decoder]
    pipeline: Pipeline | None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for model in self.models:
            yield from model.named_parameters()

    def weights(self) -> Iterator[Weight]:
        """Every weight that this rank has a slice of, with the names of its axes."""
        for model in self.models:
            yield from weights(model)


@working("building the model")
def assemble(
    config: Decoder.Config,
    layout: RankView,
    wrapping: Wrapping,
    *,
    dtype: torch.dtype,
    seed: int,
    n_microbatches: int,
    groups: Sequence[Group] = (),
    converters: Sequence[Converter.Config] = (),
) -> BuiltModel:
    """The parts of this rank, their weights drawn by (seed, name), equal in every layout.

    `n_microbatches` is how many travel a pipeline per step. Weights are stored in `dtype`; those of
    frozen `groups` get no gradient. The layers are changed by `converters` first.
    """
    models = spread_models(config, layout, wrapping, groups, converters)
    for model in models.values():
        weights_on = torch.device("cpu") if layout.settings.cpu_offload else None
        materialise(model, layout.device, dtype, weights_on=weights_on)
        init_weights(((w.name, w.value, w.start) for w in weights(model)), seed, layout.local_slice)
    return BuiltModel(list(models.values()), layout.pipeline(models, n_microbatches))


def spread_models(
    config: Decoder.Config,
    layout: RankView,
    wrapping: Wrapping,
    groups: Sequence[Group],
    converters: Sequence[Converter.Config],
    change: Callable[[Decoder], object] = lambda model: None,
) -> dict[int, Decoder]:
    """The stages of this rank by their numbers, or the whole model as 0, spread over the ranks and without memory.

    Weights of frozen `groups` get no gradient. `change` sees each model before it is spread.
    """
    settings, piped = layout.settings, layout.degrees.pipeline > 1
    stages = split_layers(settings, config.n_layers) if piped else []
    models = {}
    for number in stages_of(layout.pipeline_rank, settings, config.n_layers) if piped else [0]:
        model, _ = converted_model(config, converters)
        models[number] = model
        if piped:
            cut_stage(model, stages, number)
        freeze(model.named_parameters(), groups)
        change(model)
        layout.parallelize(model, wrapping)
    return models


def expert_loads(models: list[Decoder], layout: RankView) -> dict[str, float]:
    """How evenly the experts of all layers were loaded in the last step, as metrics; every rank must ask."""
    loads = layout.join({name: load for model in models for name, load in layer_loads(model).items()})
    (balance,) = layout.sums(sum(balance_loss(model) for model in models))
    return load_metrics(loads, balance)


def make_layout(parallelism: Parallelism, device: torch.device) -> RankView:
    """The layout of the process group, or of a process alone."""
    if not dist.is_initialized():
        return SingleRank(device)
    from core.parallel import many_ranks  # loads torch.distributed.tensor: a second that a process alone saves

    return many_ranks.ManyRanks(parallelism, device)


def make_dispatcher(run: Run, device: torch.device, world_size: int) -> Callable[[ProcessGroup], Dispatcher]:
    """What returns the dispatcher of each process group of experts. Raises `UserError` when the backend cannot run."""
    settings, sizes = run.parallelism, largest_dispatch(run, device, world_size)
    factor = settings.hybridep_non_blocking_expert_capacity_factor
    return dispatchers(settings.expert_parallel_comm_backend, device, sizes, capacity_factor=factor)


def largest_dispatch(run: Run, device: torch.device, world_size: int) -> Sizes | None:
    """What a rank sends to experts at once; None in a run where it has them all itself."""
    degrees = run.parallelism.degrees(world_size)
    routers = [config.router for config in expert_parts(run.model)]
    if not routers or degrees.expert == 1:
        return None
    training, piped = run.training, degrees.pipeline > 1
    rows = run.parallelism.pipeline_parallel_microbatch_size if piped else training.local_batch_size
    return Sizes(
        n_tokens=rows * training.seq_len // (degrees.context * degrees.tensor),
        dim=run.model.dim,
        n_experts=max(config.n_experts for config in routers),
        top_k=max(config.top_k for config in routers),
        n_ranks=degrees.expert,
        dtype=training.compute_dtype(device),
    )


def block_compiler(settings: Compile) -> Callable[[nn.Module], None] | None:
    """What compiles a block as a run's settings ask; None where they do not."""
    if not settings.takes("model"):
        return None
    torch._dynamo.config.recompile_limit += KINDS_OF_BLOCK  # it counts those of all models that a process ever had
    return partial(compile_block, backend=settings.backend)


def compile_block(block: torch.nn.Module, backend: str) -> None:
    """Let torch.compile have a block, in one graph; numbers that the host reads, such as rows to send, stay in it."""
    skip_vector_trials(backend)
    if backend == "inductor":
        from core.step.inductor_cpu import shorten_compilation  # imports Inductor

        shorten_compilation()
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # they are in its key as graphs
    block.compile(backend=backend, fullgraph=True)
