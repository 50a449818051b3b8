"""What a step of a replica group takes of one rank: core's plan of its share of the rows, and what groups exchange."""

from dataclasses import replace
from typing import Any

from core.plan.plan import Plan, Traffic
from core.plan.plan import plan as plan_of_core
from core.step.checks import check_sizes
from fault_tolerance.replicas import BUCKET_BYTES
from fault_tolerance.rows import over_groups


def plan(config: Any, *, world_size: int | None, rank: int) -> Plan:
    """The plan of rank `rank` of a group of `world_size` ranks, with all groups there. Raises `UserError` as
    `core.plan.plan.plan` does."""
    check_sizes(config)
    groups = config.fault_tolerance
    size = config.parallelism.degrees(1).world if world_size is None else world_size
    n_data = config.parallelism.degrees(size).data
    training = over_groups(config.training, n_data, groups.n_groups)
    at_once = training.local_batch_size * n_data
    share = -(-training.global_batch_size // (at_once * groups.n_groups)) * at_once
    found = plan_of_core(
        replace(config, training=replace(training, global_batch_size=share)), world_size=world_size, rank=rank
    )
    n, fp32 = groups.n_groups, 4 * found.parameters
    summed = found.gradients_bytes if groups.method == "every_step" else fp32
    bucket = min(summed, BUCKET_BYTES) if groups.method == "every_step" else fp32
    sent = Traffic(
        axis="groups", collective="all-reduce", calls=-(-summed // BUCKET_BYTES), bytes=2 * summed * (n - 1) // n
    )
    each = "" if groups.method == "every_step" else f", once in {groups.sync_steps} steps ({groups.method})"
    outer = fp32 if groups.method == "diloco" else 0
    notes = [
        f"one of {n} groups, which share {training.global_batch_size} rows of a step; alone it reads all of them",
        f"groups exchange what is sent along their axis{each}",
    ]
    if groups.method != "every_step":
        notes.append("a round keeps a copy of weights and optimizer state in the host's memory")
    # what is sent is copied together first: beside the gradients, when activations are gone
    resting = found.weights_bytes + found.optimizer_bytes + outer + found.inputs_bytes
    peak = max(found.peak_bytes + outer, resting + found.gradients_bytes + bucket)
    return replace(
        found,
        rows=training.global_batch_size,
        optimizer_bytes=found.optimizer_bytes + outer,
        peak_bytes=peak,
        traffic=[*found.traffic, sent] if n > 1 else found.traffic,
        notes=[*found.notes, *notes],
    )
