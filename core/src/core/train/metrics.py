"""What a run reports: metrics.jsonl always, a console line, TensorBoard and Weights & Biases on request."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.config.configurable import Configurable

log = logging.getLogger("armature")


@dataclass(kw_only=True, slots=True)
class Record:
    """One line of metrics.jsonl; null there for a number that is not known, was not measured, or is not finite."""

    step: int
    loss: float
    """Mean over the step's valid tokens, in nats."""
    mtp_loss: float | None
    """Mean over the depths of multi-token prediction, each divided by the step's valid tokens, in nats."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Tokens read since the run began."""
    tokens_per_second: float
    """Mean since the last line."""
    step_time_s: float
    """Mean since the last line."""
    memory_gib: float
    """Peak so far: of the accelerator's allocator, or of the process."""
    mfu: float | None
    """Model FLOPs per second as a share of the device's peak."""
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    """`validation_loss` by bytes of text, which compares between tokenizers."""
    experts: dict[str, float] = field(default_factory=dict)
    """How evenly the experts were loaded, as `core.nn.balance.load_metrics` names it; each a key of the line."""


class Metrics(Configurable):
    """Writes every record to `folder`/metrics.jsonl and to the loggers that were asked for, while the block runs."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        log_freq: int = 10
        """Steps between two lines; the first and the last step are always reported."""
        enable_tensorboard: bool = False
        """Also write TensorBoard events (needs the `tensorboard` extra)."""
        save_tb_folder: str = "tb"
        """Folder of the TensorBoard events, below the run folder."""
        enable_wandb: bool = False
        """Also report to Weights & Biases (needs the `wandb` extra; WANDB_* variables choose project and name)."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.log_freq < 1:
                yield "log_freq", f"log_freq {self.log_freq} must be at least 1"
            for chosen, package in ((self.enable_tensorboard, "tensorboard"), (self.enable_wandb, "wandb")):
                if chosen and find_spec(package) is None:
                    yield (
                        f"enable_{package}",
                        f"the package {package} is not installed: pip install {package}, or leave it off",
                    )

    def __init__(self, config: Config, *, folder: Path, settings: dict[str, Any]) -> None:
        self.config, self.folder, self.settings = config, folder, settings
        self._tensorboard: Any = None
        self._wandb: Any = None

    def __enter__(self) -> "Metrics":
        self._file = (self.folder / "metrics.jsonl").open("a", buffering=1)
        if self.config.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / self.config.save_tb_folder))
        if self.config.enable_wandb:
            import wandb

            self._wandb = wandb.init(dir=str(self.folder), config=self.settings)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def due(self, step: int, last_step: int) -> bool:
        return step == 1 or step == last_step or step % self.config.log_freq == 0

    def write(self, record: Record) -> None:
        values: dict[str, Any] = asdict(record)
        values |= values.pop("experts")
        row = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        known = {name: value for name, value in row.items() if name != "step" and value is not None}
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(name, value, record.step)
        if self._wandb is not None:
            self._wandb.log(known, step=record.step)


def last_record(folder: Path) -> Record | None:
    """The last line of the metrics.jsonl in a folder; None where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if not lines:
        return None
    row = json.loads(lines[-1])
    names = set(Record.__dataclass_fields__)
    experts = {name: value for name, value in row.items() if name not in names}
    return Record(**{name: value for name, value in row.items() if name in names}, experts=experts)
