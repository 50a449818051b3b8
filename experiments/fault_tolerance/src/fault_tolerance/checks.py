"""What replica groups do not work with, and what a run of several of them must agree on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_tolerance.replicas import Replicas


def refused(config: Any) -> Iterator[tuple[str, str]]:
    """What replica groups do not work with, and why."""
    groups, parallelism = config.fault_tolerance, config.parallelism
    if parallelism.pipeline_parallel_degree > 1:
        yield (
            "parallelism.pipeline_parallel_degree",
            f"pipeline_parallel_degree {parallelism.pipeline_parallel_degree}: a pipeline runs a fixed number of "
            "microbatches, and a group has more when another is lost: use 1",
        )
    if parallelism.cpu_offload:
        yield "parallelism.cpu_offload", "gradients are summed over groups on the device: unset cpu_offload"
    if config.optimizer.in_backward:
        yield (
            "optimizer.in_backward",
            "a step counts when the gradients of all groups have arrived, after backward: unset in_backward",
        )
    if groups.n_groups > 1 and config.dump_folder is None:
        yield "dump_folder", "the groups of a run share a folder: name it with --dump_folder"
    if groups.n_groups > 1:
        yield from shared_problems(config, groups)
    if groups.method != "every_step":
        yield from round_problems(config, groups)


def shared_problems(config: Any, groups: Replicas.Config) -> Iterator[tuple[str, str]]:
    """What several groups would write to one place, and how long their ranks must wait for one another."""
    folder, patience = config.checkpoint.folder, config.comm.train_timeout_seconds
    if config.checkpoint.enable and ("://" in folder or Path(folder).is_absolute() or ".." in Path(folder).parts):
        yield (
            "checkpoint.folder",
            f"folder {folder} would be that of all {groups.n_groups} groups: name one below the run's, as checkpoint",
        )
    if patience <= groups.timeout_s:
        yield (
            "fault_tolerance.timeout_s",
            f"timeout_s {groups.timeout_s} must be less than comm.train_timeout_seconds {patience}, which ends a group "
            "while one of its ranks still waits for another group",
        )


def round_problems(config: Any, groups: Replicas.Config) -> Iterator[tuple[str, str]]:
    """What does not fit rounds of steps, between which alone all groups are equal."""
    interval, sync = config.checkpoint.interval, groups.sync_steps
    if config.checkpoint.saves and interval % sync:
        yield (
            "checkpoint.interval",
            f"interval {interval} must be a multiple of fault_tolerance.sync_steps {sync}: groups are equal between "
            f"rounds alone; use {interval // sync * sync or sync}",
        )
    if config.validator.enable and config.validator.freq % sync:
        yield (
            "validator.freq",
            f"freq {config.validator.freq} must be a multiple of fault_tolerance.sync_steps {sync}, as "
            "checkpoint.interval must",
        )
    if config.checkpoint.enable_first_step_checkpoint and sync > 1:
        yield (
            "checkpoint.enable_first_step_checkpoint",
            f"after step 1 groups are not equal, which they are every {sync} steps: unset it",
        )
    rows, training = groups.n_groups * config.training.local_batch_size, config.training
    if training.global_batch_size != -1 and training.global_batch_size < rows:
        yield (
            "training.global_batch_size",
            f"global_batch_size {training.global_batch_size} must be at least n_groups {groups.n_groups} x "
            f"local_batch_size {training.local_batch_size} = {rows}: under {groups.method} each group needs rows",
        )
