"""What must hold between a run's settings, its ranks and its model before anything is allocated."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol, cast

import torch

from core.activation_checkpoint.apply import ActivationCheckpoint, check_names, check_parts
from core.checkpoint.settings import Checkpoint
from core.config.configurable import Configurable
from core.config.errors import UserError, check_all, joined
from core.config.fields import Problem, walk
from core.config.validate import problems_of, validate
from core.data.samples import Samples
from core.data.tokenizer import Tokenizer
from core.nn.balance import check_routers
from core.nn.decoder import Block, Decoder
from core.nn.kernel_checks import check_kernels
from core.nn.moe import MoE
from core.nn.weights import weights
from core.optim.few_bits import NUMBERS_PER_SCALE
from core.optim.groups import weight_group
from core.optim.optimizer import Optimizer
from core.optim.weight import names_matrix
from core.parallel.pipeline import checkpoint_problem, pipeline_problems, split_layers, splits_backward, stage_of
from core.parallel.settings import Degrees, Parallelism, world_problems
from core.quantization.converter import Converter
from core.step.compiler import check_compiler
from core.step.converted import check_converted
from core.step.in_backward import in_backward_problems
from core.step.loss import Loss, loss_backend
from core.step.settings import Compile, Debug, Training
from core.step.shares import check_shares, ranks_that_share, share_problems
from core.weights.hf_model import with_hf


class Run(Protocol):
    """What ranks and a plan need to know of the configuration of a run."""

    recipe: str
    model: Decoder.Config
    tokenizer: Tokenizer.Config
    dataloader: Samples.Config
    loss: Loss.Config
    training: Training
    optimizer: Optimizer.Config
    parallelism: Parallelism
    activation_checkpoint: ActivationCheckpoint.Config
    checkpoint: Checkpoint
    converters: list[Converter.Config]
    compile: Compile
    debug: Debug


def check_run(run: Run, world_size: int) -> None:
    """Raise one `UserError` with everything that is wrong in a run's settings, and that keeps it from these ranks."""
    config = cast(Configurable.Config, run)
    check_sizes(run)
    check_all(partial(validate, config), partial(check_layout, run, world_size))


def check_sizes(run: Run) -> None:
    """Raise one `UserError` with all that is wrong in the settings, if sizes and degrees are: checks need them."""
    if any(map(problems_of, (run.model, run.parallelism, run.training))):
        validate(cast(Configurable.Config, run))


def check_layout(run: Run, world_size: int) -> None:
    """Raise one `UserError` with everything that keeps a run from `world_size` ranks."""
    model, parallelism, training = run.model, run.parallelism, run.training
    problems = [(f"parallelism.{field}", message) for field, message in world_problems(parallelism, world_size)]
    degrees = parallelism.degrees(world_size)
    problems += model_problems(model, parallelism, degrees)
    problems += training_problems(training, parallelism, degrees)
    problems += in_backward_problems(run.optimizer, training, parallelism, run.debug, degrees)
    if not any(field.endswith("shard_degree") for field, _ in problems):
        size = parallelism.pipeline_parallel_microbatch_size
        n_microbatches = training.rows_per_step(degrees.data) // degrees.data // size
        found = pipeline_problems(parallelism, model.n_layers, n_microbatches)
        problems += [(f"parallelism.{field}", message) for field, message in found]
    if message := checkpoint_problem(parallelism, run.activation_checkpoint.mode):
        problems.append(("activation_checkpoint.mode", message))
    if run.compile.takes("model"):
        problems += layout_compile_problems(parallelism, degrees, run.activation_checkpoint.mode)
    if problems:
        raise joined(problems)


def training_problems(training: Training, parallelism: Parallelism, degrees: Degrees) -> Iterator[Problem]:
    """What keeps the rows of a step from being dealt out."""
    multiple = degrees.sequence_multiple
    if training.seq_len % multiple:
        yield (
            "training.seq_len",
            f"seq_len {training.seq_len} must be a multiple of {multiple} (tensor_parallel_degree {degrees.tensor}"
            f"{f' x 2 context_parallel_degree {degrees.context}' if degrees.context > 1 else ''}): "
            f"use {training.seq_len // multiple * multiple or multiple}",
        )
    rows = training.local_batch_size * degrees.data
    if training.global_batch_size != -1 and training.global_batch_size % rows:
        yield (
            "training.global_batch_size",
            f"global_batch_size {training.global_batch_size} must be a multiple of local_batch_size "
            f"{training.local_batch_size} x {degrees.data} data ranks = {rows}, or -1",
        )
    size = parallelism.pipeline_parallel_microbatch_size
    if degrees.pipeline > 1 and training.local_batch_size % size:
        yield (
            "parallelism.pipeline_parallel_microbatch_size",
            f"pipeline_parallel_microbatch_size {size} must divide local_batch_size {training.local_batch_size}",
        )


def model_problems(model: Decoder.Config, parallelism: Parallelism, degrees: Degrees) -> Iterator[Problem]:
    """What keeps a model from being cut this way."""
    yield from share_problems(model, parallelism)
    if degrees.expert * degrees.tensor > 1 and expert_parts(model):
        from core.parallel import data  # loads torch.distributed.tensor: a second that a process alone saves

        if problem := data.expert_problem(degrees):
            yield f"parallelism.{problem.split()[0]}", problem
    if degrees.expert > 1 and not expert_parts(model):
        yield (
            "parallelism.expert_parallel_degree",
            f"expert_parallel_degree {degrees.expert} asked for, and the model has no experts: leave it at 1",
        )
    if degrees.pipeline > 1 and model.tie_embeddings:
        yield (
            "parallelism.pipeline_parallel_degree",
            "a pipeline would hold the tied embedding and head on different ranks, which is not supported: set "
            "pipeline_parallel_degree 1 or model.tie_embeddings false",
        )
    if model.n_mtp_layers and degrees.pipeline * degrees.context > 1:
        yield (
            "model.n_mtp_layers",
            "multi-token prediction with a pipeline or context parallelism is not supported: set n_mtp_layers 0, or "
            "pipeline_parallel_degree and context_parallel_degree 1",
        )


def compile_problems(
    compiling: Compile, checkpoint: ActivationCheckpoint.Config, parallelism: Parallelism
) -> Iterator[Problem]:
    """What is asked of torch.compile, which is not on."""
    if compiling.takes("model"):
        return
    if checkpoint.mode == "memory_budget":
        yield (
            "activation_checkpoint.mode",
            "memory_budget is torch.compile's choice: add --compile.enable with model in compile.components, "
            "or use selective",
        )
    if parallelism.enable_async_tensor_parallel:
        yield (
            "parallelism.enable_async_tensor_parallel",
            "asynchronous tensor parallelism is torch.compile's work: add --compile.enable with model in "
            "compile.components",
        )


def layout_compile_problems(parallelism: Parallelism, degrees: Degrees, checkpoint_mode: str) -> Iterator[Problem]:
    """Layouts whose blocks PyTorch 2.13 cannot compile."""
    axis = "tensor" if degrees.tensor > 1 else "expert"
    if checkpoint_mode == "full" and degrees.tensor * degrees.expert > 1:
        yield (
            "activation_checkpoint.mode",
            f"full with compile and {axis}_parallel_degree {getattr(degrees, axis)}: PyTorch 2.13 cannot compile that; "
            "use selective, or leave model out of compile.components",
        )
    if splits_backward(parallelism):
        yield (
            "parallelism.pipeline_parallel_schedule",
            "a compiled block has one backward, and the schedule computes it in two passes: use Interleaved1F1B, or "
            "leave model out of compile.components",
        )


def expert_parts(model: Decoder.Config) -> list[MoE.Config]:
    """The mixtures of experts that a model is configured of; none for a dense one."""
    return [config for _, config in walk(model, "model") if isinstance(config, MoE.Config)]


def check_model(model: Decoder, run: Run, device: torch.device) -> None:
    """Raise one `UserError` with everything that keeps a model, on the meta device still, from being trained so."""
    check_all(
        partial(check_attention, model, run, device),
        partial(check_shares, model, run.parallelism),
        partial(check_converted, model, run, device),
        partial(check_overlap, run.parallelism, device),
        check_compiler if compiles_on_cpu(run, device) else lambda: None,
        partial(check_pinned, run.checkpoint, device),
        partial(check_routers, model) if run.debug.moe_force_load_balance else lambda: None,
        partial(check_names, run.activation_checkpoint, model),
        partial(check_parts, run.activation_checkpoint, model),
        partial(check_optimizer, run.optimizer, model),
        partial(check_stages, run, model),
        partial(check_blocks, run, model),
        lambda: with_hf(model).to_hf_config() if run.checkpoint.last_save_in_hf else None,
    )


def check_attention(model: Decoder, run: Run, device: torch.device) -> None:
    """Raise `UserError` for an attention kernel that cannot do what a run asks of it."""
    parallelism = run.parallelism
    check_kernels(
        (block.attention for block in model.layers.values() if isinstance(block, Block)),
        n_shares=ranks_that_share("heads", parallelism)[0],
        device=device,
        dtype=run.training.compute_dtype(device),
        trains=True,
        documents=run.training.mask_of(run.dataloader) == "document",
        reordered=parallelism.context_parallel_degree > 1,
    )


def compiles_on_cpu(run: Run, device: torch.device) -> bool:
    """Whether Inductor compiles a part of a run for a CPU."""
    parts = run.compile.takes("model") or loss_backend(run.compile, run.loss, device) is not None
    return device.type == "cpu" and run.compile.backend == "inductor" and parts


def check_overlap(parallelism: Parallelism, device: torch.device) -> None:
    """Raise `UserError` when communication is to overlap with products where it cannot."""
    if parallelism.enable_async_tensor_parallel and device.type == "cpu":
        raise UserError(
            "parallelism.enable_async_tensor_parallel wants GPUs with symmetric memory: leave it off on a cpu"
        )


def check_pinned(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raise `UserError` when memory is to be pinned for a device that does not copy from it."""
    if checkpoint.async_mode == "async_with_pinned_mem" and device.type == "cpu":
        raise UserError("checkpoint.async_mode async_with_pinned_mem needs an accelerator: use async on a cpu")


def check_optimizer(optimizer: Optimizer.Config, model: Decoder) -> None:
    """Raise `UserError` for settings of the optimizer that do not fit the weights of a model."""
    problems = list(optimizer.weight_problems(list(weights(model))))
    if problems:
        raise joined([(f"optimizer.{field}", message) for field, message in problems])


def check_blocks(run: Run, model: Decoder) -> None:
    """Raise `UserError` for states in 8 bits of weights whose rows are cut within a block, which has one scale."""
    if run.optimizer.state_dtype != "8-bit":
        return
    for weight in weights(model):
        (n, words), columns = ranks_that_share(weight.axes[-1], run.parallelism), weight.value.shape[-1]
        if weight.value.requires_grad and names_matrix(weight.axes) and n > 1 and columns % (n * NUMBERS_PER_SCALE):
            raise UserError(
                f"optimizer.state_dtype 8-bit has a scale for {NUMBERS_PER_SCALE} numbers of a row, and {words} cuts "
                f"the {columns:,} columns of {weight.name} into {n}, no multiple of it: use bfloat16, or a lower degree"
            )


def check_stages(run: Run, model: Decoder) -> None:
    """Raise `UserError` for a stage of a pipeline whose weights are all frozen: nothing would flow back through it."""
    if run.parallelism.pipeline_parallel_degree == 1 or not any(group.frozen for group in run.optimizer.groups):
        return
    stages = split_layers(run.parallelism, model.config.n_layers)
    names = (name for name, _ in model.named_parameters())
    trained = {stage_of(name, stages) for name in names if not weight_group(run.optimizer.groups, name).frozen}
    if lost := sorted(set(range(len(stages))) - trained):
        raise UserError(
            f"optimizer.groups: all weights of stage {lost[0]} of {len(stages)} are frozen, and a pipeline needs some "
            "to train in each: train some of them, or lower parallelism.pipeline_parallel_degree"
        )
