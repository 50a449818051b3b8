"""What a run reports: metrics.jsonl always, a console line, TensorBoard and Weights & Biases on request."""

import io
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.config.configurable import Configurable
from core.runtime.disk import AppendedFile, OptionalFile, needed
from core.runtime.ranks import ALONE, Ranks
from core.runtime.records import RECORDS, read_records
from core.train.folder import ANOTHER


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

    def __init__(
        self, config: Config, *, folder: Path, settings: dict[str, Any], ranks: Ranks = ALONE, start: int = 0
    ) -> None:
        """`start` is the step that the run goes on after: what a curve in TensorBoard has of later ones is hidden."""
        self.config, self.folder, self.settings, self.ranks = config, folder, settings, ranks
        self._records = AppendedFile(folder / RECORDS)
        self._events = EventFile(folder / config.save_tb_folder, start + 1) if config.enable_tensorboard else None
        self._wandb: Any = None
        self._reports = OptionalFile("the log of Weights & Biases")

    def __enter__(self) -> "Metrics":
        """Open what is written, on the first rank; a collective. Raises `UserError` where that cannot be written."""
        self.ranks.first(self._open)
        return self

    def __exit__(self, *error: object) -> None:
        if self.ranks.rank > 0:
            return
        self._records.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            with self._reports.attempt():
                self._wandb.finish()

    def _open(self) -> None:
        with needed(self.folder, ANOTHER):
            self._records.create()
            if self._events is not None:
                self._events.open()
        if self.config.enable_wandb:
            import wandb

            self._wandb = wandb.init(dir=str(self.folder), config=self.settings)

    def due(self, step: int, last_step: int) -> bool:
        return step == 1 or step == last_step or step % self.config.log_freq == 0

    def write(self, record: Record) -> None:
        """Write a record, on the first rank. What cannot be written is a warning."""
        values: dict[str, Any] = asdict(record)
        values |= values.pop("numbers")
        row = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        self._records.append(json.dumps(row).encode() + b"\n")
        known = {name: value for name, value in row.items() if name != "step" and value is not None}
        if self._events is not None:
            self._events.write(record.step, known)
        if self._wandb is not None:
            with self._reports.attempt():
                self._wandb.log(known, step=record.step)


class EventFile:
    """The scalars of this process in a file of TensorBoard's events, in a folder that others may be in.

    TensorBoard's own writer has a thread that ends with a traceback when the disk is full; its events are taken here,
    and written as records are.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)

    def open(self) -> None:
        """Begin the file. Raises `OSError` where it cannot be written."""
        events = event_types()
        self._folder.mkdir(parents=True, exist_ok=True)
        start = events.Event(step=self._first_step, session_log=events.SessionLog(status=events.SessionLog.START))
        self._file.create(self._framed(events.Event(file_version="brain.Event:2"), start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step, by their names."""
        from torch.utils.tensorboard.summary import scalar

        events = event_types()
        scalars = (events.Event(step=step, summary=scalar(name, value)) for name, value in values.items())
        self._file.append(self._framed(*scalars))

    def close(self) -> None:
        """Write what waited, and tell what is missing."""
        self._file.close()

    def _framed(self, *events: Any) -> bytes:
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        writer = RecordWriter(framed)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        return framed.getvalue()


def event_types() -> Any:
    """TensorBoard's module of events, which makes its classes when it is loaded."""
    from tensorboard.compat.proto import event_pb2

    return event_pb2


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
