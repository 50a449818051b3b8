"""What one replica group hands to another: the state of the run after a step, as JSON and tensors."""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.checkpoint.manifest import Progress
from core.config.errors import UserError
from core.config.json_file import parse_json
from core.config.record import differences
from core.optim.optimizer import Optimizer
from core.optim.weight import local_tensor
from core.parallel.layout import RankView
from core.step.assemble import BuiltModel
from core.step.spikes import SpikeDetector
from core.train.checkpoints import RunCheckpoints
from core.train.identity import MAY_DIFFER
from core.train.state import model_tensors, optimizer_tensors

OWN = (*MAY_DIFFER, "fault_tolerance.group", "fault_tolerance.lighthouse")
"""Ends of the paths of settings that groups may have of their own."""


class Snapshot(NamedTuple):
    """The state of a run as it travels."""

    header: bytes
    """How far the run is, and the names, types and shapes of the tensors, as JSON."""
    tensors: list[Tensor]
    """This rank's slices, of any shape: weights, buffers that are saved, the optimizer's state and an outer one's."""


class RunState:
    """The state of a run on one rank of a group."""

    def __init__(
        self,
        checkpoints: RunCheckpoints,
        built: BuiltModel,
        optimizer: Optimizer,
        layout: RankView,
        *,
        settings: dict[str, Any],
    ) -> None:
        self.checkpoints, self.built, self.optimizer, self.layout = checkpoints, built, optimizer, layout
        self.settings = settings
        self.step = checkpoints.start.step
        """Steps that count."""
        self.history = 0
        """A number that groups share as long as they have taken part in the same attempts."""
        self.model = model_tensors(built.models)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's slices of all that a step changes, by name."""
        found = self.model | optimizer_tensors(self.optimizer) | self.checkpoints.further
        return {name: local_tensor(tensor).detach() for name, tensor in found.items()}

    def snapshot(self) -> Snapshot:
        """The state as it is now, not copied."""
        tensors, checkpoints = self.tensors(), self.checkpoints
        start = checkpoints.start
        header = {
            "step": self.step,
            "history": self.history,
            "start": [start.step, start.tokens, start.rows],
            "rows_per_step": checkpoints.n_rows,
            "text": checkpoints.loader.fingerprint,
            "spikes": checkpoints.spikes.state(),
            "observers": checkpoints.observers.state(),
            "tensors": described(tensors),
            "settings": self.settings,
        }
        return Snapshot(json.dumps(header).encode(), list(tensors.values()))

    def check(self, header: bytes) -> None:
        """Raise `UserError` where the state that a header announces is not one of this run and this rank."""
        theirs = parse_json(header, "the state of another replica group")
        found = unequal(self.settings, theirs["settings"])
        mine = {"text": self.checkpoints.loader.fingerprint, "rows_per_step": self.checkpoints.n_rows}
        found += [f"{name} {theirs[name]} there, {own} here" for name, own in mine.items() if theirs[name] != own]
        if theirs["tensors"] != described(self.tensors()):
            found.append("the tensors of a rank have other names, types or shapes: use as many ranks in each group")
        if found:
            raise UserError(
                "\n  ".join(["another replica group has a run of other settings:", *found[:20]])
                + "\nstart all groups with the same command, but for fault_tolerance.group, and the same text"
            )

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Go on from what another group has, as `check` let it pass."""
        theirs = parse_json(snapshot.header, "the state of another replica group")
        for mine, other in zip(self.tensors().values(), snapshot.tensors, strict=True):
            mine.copy_(other)
        self.step, self.history = theirs["step"], theirs["history"]
        step, tokens, rows = theirs["start"]
        checkpoints = self.checkpoints
        checkpoints.stand_at(Progress(step=step, tokens=tokens, rows=rows))
        checkpoints.spikes = SpikeDetector(checkpoints.run.debug)
        checkpoints.spikes.restore(theirs["spikes"])
        checkpoints.observers.restore(theirs["observers"])
        self.layout.let_go(self.built.models)


def unequal(own: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The settings, that groups of one run must have in common and do not, with both values."""
    found = [each for each in differences(own, theirs) if not each[0].endswith(OWN)]
    return [f"{path} {other} there, {mine} here" for path, other, mine in found]


def described(tensors: dict[str, Tensor]) -> list[list[Any]]:
    """The name, type and shape of each tensor, of any shape."""
    return [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]
