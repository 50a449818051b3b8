"""A run's checkpoint out of one of torchtitan's: weights, what its AdamW keeps of them, and the step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.manifest import Progress
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.config.record import to_json
from core.runtime.ranks import Ranks
from core.weights.hf_model import StoredModel
from core.weights.shard_file import Header, RowSpan
from core.weights.source import StoredFiles, WeightSource

STATE = "optimizer.state."
MOMENTS = ("exp_avg", "exp_avg_sq")


class StateFiles:
    """What an optimizer keeps under one name of each weight, by the names of the weights."""

    def __init__(self, files: StoredFiles, key: str) -> None:
        self.files, self.end = files, f".{key}"
        self.promised: dict[str, str] = {}
        self.headers: dict[str, Header] = {
            name.removeprefix(STATE).removesuffix(self.end): header
            for name, header in files.headers.items()
            if name.startswith(STATE) and name.endswith(self.end)
        }

    def __str__(self) -> str:
        return f"{self.files}, {STATE}*{self.end}"

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """The state of a weight, or rows of it."""
        return self.files.read(f"{STATE}{key}{self.end}", rows)


def write_run(model: StoredModel, source: WeightSource, run: Any, folder: Path, say: Callable[[str], object]) -> None:
    """Write the weights of `source`, the moments and the step as the only checkpoint of a run of this configuration in
    a folder that is there. All of it is in memory.

    Raises `UserError` where the folder has no such state.
    """
    steps = StateFiles(source.folder, "step")
    if not steps.headers:
        raise UserError(f"{source.folder} has no state of AdamW: leave --with-optimizer out")
    step = steps.read(next(iter(steps.headers)))
    tensors = filled(source, "model.{}")
    parameters = dict(model.named_parameters(remove_duplicate=True))
    weights = {name: each for name, each in source.key_map.weights.items() if name in parameters}
    places = {name: source.key_map.places[name] for name in weights}
    of_parameters = replace(source.key_map, weights=weights, places=places)
    for key in MOMENTS:
        tensors |= filled(WeightSource(of_parameters, StateFiles(source.folder, key)), f"optimizer.{{}}.{key}")
    tensors |= {f"optimizer.{name}.step": step.float().clone() for name in weights}
    settings = Checkpoint(enable=True)
    settings.storage(folder).make("")
    config = to_json(run)
    saver = Saver(settings, Ranks(), run_folder=folder, config=config, export=lambda found, place: None)
    saver.save(Progress(step=int(step)), tensors, kind="full", wait=True)
    (folder / "config.json").write_text(config)
    say(f"checkpoint/step-{int(step)}: {len(weights)} weights and their moments")


def filled(source: WeightSource, name: str) -> dict[str, Tensor]:
    """The values that a source has, under our names in this pattern."""
    shapes = {each: weight.shape for each, weight in source.key_map.weights.items() if each in source.pieces}
    return {
        name.format(each): source.fill(each, torch.empty(shape, dtype=source.dtype(each)))
        for each, shape in shapes.items()
    }
