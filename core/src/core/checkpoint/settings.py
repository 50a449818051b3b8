"""Settings of checkpoints."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.checkpoint.storage import Storage, steps_in
from core.config.configurable import Configurable
from core.config.record import absolute

State = Literal["model", "optimizer", "dataloader", "train_state", "random"]


@dataclass(kw_only=True, slots=True)
class Checkpoint(Configurable.Config):
    """What is saved of a run, when, and what a run begins with."""

    enable: bool = False
    """Save checkpoints, and go on from them."""
    folder: str = "checkpoint"
    """Where: a folder below the run's, an absolute path, or an fsspec URI such as s3://bucket/run."""
    interval: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step as well."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto goes on from the newest whole checkpoint if there is any, must ends without one, never begins anew in a
    folder that has none."""
    load_step: int = -1
    """Go on from the checkpoint of this step; -1 is the newest."""
    initial_load_path: str | None = None
    """Begin with the weights of this folder: a run, a checkpoint, weights that `convert` wrote, or Hugging Face's."""
    initial_load_model_only: bool = True
    """Take the weights alone; without it also the optimizer, the step, and the place in the data."""
    initial_load_in_hf: bool = False
    """initial_load_path must be a Hugging Face folder; such a one is recognised without it."""
    initial_load_in_hf_quantized: bool = False
    """Decode weights of that folder that are stored in few bits."""
    allow_model_change: bool = False
    """Begin with weights of a model that computes with other settings, such as another rope base or window."""
    exclude_from_loading: list[State] = field(default_factory=list)
    """What is left as a new run has it."""
    allow_config_change: bool = False
    """Go on although settings changed that make another run of it."""
    keep_latest_k: int = 10
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 is none."""
    keep_best_k: int = 0
    """So many with the lowest validation loss, measured at their step, are kept."""
    keep_steps: list[int] = field(default_factory=list)
    """Checkpoints of these steps are kept for good."""
    last_save_model_only: bool = False
    """The checkpoint of the last step holds the weights alone: no run can go on from it."""
    last_save_in_hf: bool = False
    """That checkpoint holds a Hugging Face folder as well, `hf`."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in a checkpoint of weights alone."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write while training goes on, from a copy in the host's memory; pinned, an accelerator fills it faster."""
    load_only: bool = False
    """Go on from checkpoints, and save none."""
    on_sigusr1: Literal["stop", "save"] = "stop"
    """What SIGUSR1 does after the current step: save and stop, as the other signals do, or save and go on."""

    def places(self) -> dict[str, Any]:
        return {"initial_load_path": absolute(self.initial_load_path)}

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.on_sigusr1 == "save" and not self.saves:
            yield "on_sigusr1", "on_sigusr1 save needs checkpoints: add --checkpoint.enable, or use stop"
        if not self.enable:
            for name in ("initial_load_path", "load_only", "last_save_in_hf"):
                if getattr(self, name):
                    yield name, f"{name} is set and enable is not: add --checkpoint.enable"
            return
        if not self.folder:
            yield "folder", "folder is empty: name one"
        if self.interval < 1:
            yield "interval", f"interval {self.interval} must be at least 1"
        if self.load_step < -1:
            yield "load_step", f"load_step {self.load_step} must be a step, or -1 for the newest"
        if self.load_step != -1 and self.resume == "never":
            yield "load_step", f"load_step {self.load_step} and resume never exclude each other"
        for name in ("keep_latest_k", "keep_every", "keep_best_k"):
            if getattr(self, name) < 0:
                yield name, f"{name} {getattr(self, name)} must not be negative"
        for name, needs in (
            ("last_save_in_hf", "last_save_model_only"),
            ("initial_load_in_hf", "initial_load_path"),
            ("initial_load_in_hf", "initial_load_model_only"),
            ("initial_load_in_hf_quantized", "initial_load_path"),
        ):
            if getattr(self, name) and not getattr(self, needs):
                yield name, f"{name} needs {needs}: set it, or leave {name} out"
        if self.export_dtype != "float32" and not self.last_save_model_only:
            yield "export_dtype", f"export_dtype {self.export_dtype} needs last_save_model_only: set it"
        if self.last_save_in_hf and "://" in self.folder:
            yield "last_save_in_hf", f"last_save_in_hf writes to this machine, not to {self.folder}: convert afterwards"

    @property
    def saves(self) -> bool:
        """Whether a run leaves checkpoints."""
        return self.enable and not self.load_only

    @property
    def saving_signal(self) -> signal.Signals | None:
        """The signal that asks for a checkpoint and not for the end."""
        return signal.SIGUSR1 if self.on_sigusr1 == "save" else None

    def storage(self, run_folder: str | Path) -> Storage:
        """Where a run in this folder keeps its checkpoints."""
        return Storage(self.folder if "://" in self.folder else Path(run_folder).absolute() / self.folder)

    def continues(self, run_folder: str | Path) -> bool:
        """Whether a run that finds checkpoints in this folder goes on from them."""
        return self.enable and self.resume != "never" and bool(steps_in(self.storage(run_folder)))
