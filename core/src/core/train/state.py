"""What a run goes on from: every tensor that a step changes, by name, and how far it has come."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint.find import Found
from core.config.errors import UserError, at_most
from core.config.record import differences
from core.nn.decoder import Decoder
from core.optim.optimizer import Optimizer
from core.runtime.device import random_state, set_random_state
from core.weights.key_map import mtp_weights

log = logging.getLogger("armature")

_CPU = torch.device("cpu")

MAY_CHANGE = (
    "recipe",
    "metrics.",
    "observers",
    "profiling.",
    "parallelism.",
    "comm.",
    "activation_checkpoint.",
    "compile.",
    "checkpoint.",
    "optimizer.in_backward",
    "validator.",
    "dataloader.processes",
    "training.device",
    "training.gc_freq",
    "training.local_batch_size",
    "training.global_batch_size",
    "debug.detect_anomaly",
    "debug.deterministic",
    "debug.log_every_rank",
    "debug.on_nonfinite",
    "debug.on_spike",
    "debug.spike_",
)
"""Settings, or beginnings of their paths, that may change when a run goes on: what it learns stays the same. So may
those that name a place: what lies there is compared as the fingerprint of the text."""


def model_tensors(models: list[Decoder]) -> dict[str, Tensor]:
    """Weights, and buffers that are saved, of the stages of a model that this rank holds.

    To be asked before the first step: later a weight may be gathered, and be another tensor.
    """
    tensors: dict[str, Tensor] = {}
    for model in models:
        kept = model.state_dict().keys()
        tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in kept}
        tensors |= {f"model.{name}": weight for name, weight in model.named_parameters()}
    return tensors


def trained_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `model_tensors`, of any shape, that a run changes: all but weights without a gradient."""
    return {n: tensor for n, tensor in tensors.items() if tensor.requires_grad or not isinstance(tensor, nn.Parameter)}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps of all weights, by the names that it gave."""
    return {
        f"optimizer.{name}.{key}": tensor for name, state in optimizer.state.items() for key, tensor in state.items()
    }


def check_optimizer_state(stored: Iterable[str], keys: Iterable[str], optimizer: Optimizer, *, place: str) -> None:
    """Raise `UserError` where the tensors `stored` in a checkpoint are the state of an optimizer that keeps other ones
    of a weight than `keys`."""
    there = {name.rpartition(".")[2] for name in stored if name.startswith("optimizer.")}
    if there != set(keys):
        raise UserError(
            f"{place} has the state of another optimizer, {', '.join(sorted(there))} of each weight, and "
            f"{type(optimizer).__name__} keeps {', '.join(sorted(keys))}: go on with that optimizer, or let this one "
            "begin anew, --checkpoint.exclude_from_loading optimizer"
        )


def stored_tensors(tensors: Mapping[str, Tensor], found: Found) -> dict[str, Tensor]:
    """Those of `tensors`, of any shape, that a checkpoint has; the others stay as they are, and a line says so."""
    stored = found.tensors()
    for kind in dict.fromkeys(name.partition(".")[0] for name in tensors):
        names = [name for name in tensors if name.partition(".")[0] == kind]
        lacking = [name for name in names if name not in stored]
        if len(lacking) == len(names):
            log.info(f"{found} has no tensors {kind}: they begin anew")
        elif lacking:
            few = f"{len(lacking):,} of the {len(names):,} tensors {kind}"
            log.info(f"{found} lacks {few}, which begin anew: {', '.join(at_most(3, lacking))}")
    return {name: tensor for name, tensor in tensors.items() if name in stored}


def weights_to_begin_with(weights: Mapping[str, Tensor], found: Found, n_layers: int) -> dict[str, Tensor]:
    """The `weights` of this rank, of any shape, that a run begins with: those of multi-token prediction, behind the
    layers, stay as they were drawn where a checkpoint has none."""
    stored = (name for name in found.tensors() if name.startswith("model."))
    lacking = mtp_weights(weights, n_layers) if not mtp_weights(stored, n_layers) else frozenset()
    if lacking:
        log.info(f"{found} has no weights of multi-token prediction: they are not loaded")
    return {name: weight for name, weight in weights.items() if name not in lacking}


def random_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """Copies of the states of this rank's random generators."""
    return {f"random.{rank}.{each.type}": random_state(each) for each in dict.fromkeys([_CPU, device])}


def set_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing from these states, each (bytes,) of uint8."""
    for name, state in states.items():
        set_random_state(state, _CPU if name.endswith(".cpu") else device)


def check_same_run(
    now: dict,
    before: dict,
    *,
    place: str,
    step: int,
    rows_per_step: tuple[int, int],
    text: tuple[str, str],
    places: Iterable[str],
    override: bool,
) -> list[str]:
    """What differs from the configuration, the batch (before, now) and the text (before, now) of a checkpoint of
    `step`.

    `before` is complete: a setting that is newer than the checkpoint stands there at its default. `places` are the
    settings that name a place. A run may have more steps now where it was finished, and the schedule goes on as that of
    the longer run, and where `lr_scheduler.total_steps` says how long the schedule is: what it learned is as it was.
    Raises `UserError` when a difference makes another run of it and nothing overrides it.
    """
    steps = before["training"]["steps"]
    longer = ["training.steps"] if step >= steps < now["training"]["steps"] or has_own_length(before) else []
    free = (*MAY_CHANGE, *places, *longer)
    changes = [change for change in differences(now, before) if change[0] != "dump_folder"]  # one that is found there
    found = [(path, f"{path} {shown(old)} -> {shown(new)}") for path, old, new in changes]
    other = [line for path, line in found if not path.startswith(free)]
    if rows_per_step[0] != rows_per_step[1]:
        other.append(
            f"rows per step {rows_per_step[0]} -> {rows_per_step[1]}: --training.global_batch_size {rows_per_step[0]} "
            "keeps them"
        )
    if text[0] != text[1]:
        other.append("the text or the tokenizer has changed since")
    if other and not override:
        raise UserError(
            "\n  ".join([f"{place} is of another run:", *other])
            + "\nundo that, choose another folder, or go on nevertheless with --checkpoint.allow_config_change"
        )
    return [line for path, line in found if path.startswith(free)] + other


def has_own_length(config: dict) -> bool:
    """Whether the schedule of a run does not depend on its steps."""
    return config["lr_scheduler"]["total_steps"] is not None


def shown(value: Any) -> str:
    """A value as it is told; `...` is that of a setting that one of two versions does not know."""
    return "(not known)" if value is ... else str(value)
