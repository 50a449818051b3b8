"""What a run reports: metrics.jsonl always, and on request TensorBoard, Weights & Biases, Trackio and MLflow."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.config.configurable import Configurable
from core.runtime.disk import AppendedFile, needed
from core.runtime.log import live_line
from core.runtime.ranks import ALONE, Ranks
from core.runtime.records import RECORDS, read_records
from core.train.folder import ANOTHER
from core.train.loggers import Logger, MLflow, TensorBoard, Told, Trackio, WeightsAndBiases, tag

PACKAGES_OF_LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""The switches of loggers, and what each needs."""


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
    """Tokens read since the run began, without padding."""
    tokens_per_second: float
    """Mean since the last line."""
    step_time_s: float
    """Mean since the last line."""
    data_wait_s: float = 0.0
    """Of that, how long a step waited for its rows, which are read while the step before is computed."""
    memory_gib: float
    """Peak so far: of the accelerator's allocator, or of the process."""
    mfu: float | None
    """Model FLOPs per second as a share of the device's peak."""
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    """`validation_loss` by bytes of text, which compares between tokenizers."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Numbers with names of their own, each a key of the line: how evenly the experts were loaded, as
    `core.nn.balance.load_metrics` names it, and what observers returned."""


class Metrics(Configurable):
    """Writes every record to `folder`/metrics.jsonl and to the loggers that were asked for, while the block runs."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        log_freq: int = 10
        """Steps between two lines; the first and the last step are always reported."""
        per_layer_freq: int | None = None
        """Steps between two measurements of single layers, whose numbers are in the next line: norms of weights,
        gradients and updates, activations and the largest logits of attention (not under torch.compile), routers. A
        measured step holds its weights a second time."""
        enable_tensorboard: bool = False
        """Also write TensorBoard events (needs the `tensorboard` extra)."""
        save_tb_folder: str = "tb"
        """Folder of the TensorBoard events, below the run folder."""
        save_for_all_ranks: bool = False
        """Each rank writes TensorBoard events, in folders rank-0, rank-1 and so on: its own speed, waits and memory."""
        enable_wandb: bool = False
        """Also report to Weights & Biases (needs the `wandb` extra; WANDB_* variables say what is not set here)."""
        enable_trackio: bool = False
        """Also report to the local store of Trackio (pip install trackio)."""
        enable_mlflow: bool = False
        """Also report to MLflow (pip install mlflow), at MLFLOW_TRACKING_URI or in mlflow.db in the run's folder."""
        project: str | None = None
        """Project of the run at those three, MLflow's experiment; None is theirs, or else armature."""
        run_name: str | None = None
        """Name of the run there; None is theirs, or else that of the run's folder."""
        tags: list[str] = field(default_factory=list)
        """Tags of the run at Weights & Biases and MLflow."""
        offline: bool = False
        """Weights & Biases keep the run in a folder below the run's, for `wandb sync`."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.log_freq < 1:
                yield "log_freq", f"log_freq {self.log_freq} must be at least 1"
            if self.per_layer_freq is not None and self.per_layer_freq < 1:
                yield "per_layer_freq", f"per_layer_freq {self.per_layer_freq} must be at least 1, or None for none"
            for name, package in PACKAGES_OF_LOGGERS.items():
                if getattr(self, f"enable_{name}") and find_spec(package) is None:
                    yield (
                        f"enable_{name}",
                        f"the package {package} is not installed: pip install {package}, or leave it off",
                    )

    def __init__(
        self, config: Config, *, folder: Path, settings: dict[str, Any], ranks: Ranks = ALONE, start: int = 0
    ) -> None:
        """`start` is the step that the run goes on after: what a curve in TensorBoard has of later ones is hidden."""
        self.config, self.folder, self.settings, self.ranks = config, folder, settings, ranks
        self._records = AppendedFile(folder / RECORDS)
        c, events = config, folder / config.save_tb_folder
        told = Told(folder, settings, start, c.project, c.run_name, list(c.tags), c.offline)
        self._shown = ExitStack()
        self._loggers: list[Logger] = []
        if c.enable_tensorboard and (c.save_for_all_ranks or ranks.rank == 0):
            self._loggers.append(TensorBoard(told, events / f"rank-{ranks.rank}" if c.save_for_all_ranks else events))
        chosen = {WeightsAndBiases: c.enable_wandb, Trackio: c.enable_trackio, MLflow: c.enable_mlflow}
        if ranks.rank == 0:
            self._loggers += [logger(told) for logger, is_chosen in chosen.items() if is_chosen]

    def __enter__(self) -> "Metrics":
        """Open what is written; a collective. Raises `UserError` where that cannot be written."""
        self.ranks.first(self._open)
        if self.ranks.rank > 0:
            self._open_loggers()
        self._shown.enter_context(live_line())
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.close()
        if self.ranks.rank == 0:
            self._records.close()
        for logger in self._loggers:
            logger.close()

    def _open(self) -> None:
        with needed(self.folder, ANOTHER):
            self._records.create()
        self._open_loggers()

    def _open_loggers(self) -> None:
        with needed(self.folder, ANOTHER):
            for logger in self._loggers:
                logger.open()

    def due(self, step: int, last_step: int) -> bool:
        return step == 1 or step == last_step or step % self.config.log_freq == 0

    def write(self, record: Record) -> None:
        """Write a record, as far as this rank writes any. What cannot be written is a warning."""
        values: dict[str, Any] = asdict(record)
        values |= values.pop("numbers")
        if self.ranks.rank == 0:
            row = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
            self._records.append(json.dumps(row).encode() + b"\n")
        known = {tag(name): float(value) for name, value in values.items() if name != "step" and value is not None}
        for logger in self._loggers:
            logger.write(record.step, known)


def last_record(folder: Path) -> Record | None:
    """The last record in the metrics.jsonl of a folder, which an older version may have written; None without one."""
    fields = Record.__dataclass_fields__
    needed = {name for name, each in fields.items() if each.default is each.default_factory is MISSING}
    rows = [row for row in read_records(folder) if needed <= row.keys()]
    if not rows:
        return None
    names = rows[-1].keys() & fields.keys()
    numbers = {name: value for name, value in rows[-1].items() if name not in names}
    return Record(**{name: rows[-1][name] for name in names}, numbers=numbers)
