"""Where the records of a run go besides metrics.jsonl: one class for each program that shows them.

None of them may end a run: what goes wrong after the start is a warning. No key or password is written: each library
finds its own, in the environment or in files of the user.
"""

import io
import json
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from core.runtime.disk import AppendedFile, OptionalFile, replace_file

RUN_IDS = "logger-runs.json"
"""The runs at other programs that a folder's run is, by the program: a run that goes on goes on there, too."""
SPEED = ("tokens", "tokens_per_second", "step_time_s", "data_wait_s", "memory_gib", "mfu")
VALIDATION = "validation_"


class Told(NamedTuple):
    """What loggers are told of a run."""

    folder: Path
    settings: Mapping[str, Any]
    """The configuration, nested."""
    start: int
    """The step that the run goes on after."""
    project: str | None
    name: str | None
    tags: list[str]
    offline: bool


class Logger(Protocol):
    """Shows the numbers of a run."""

    def open(self) -> None:
        """Begin, or go on where the run of this folder was. Raises `OSError` where nothing can be written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step, by their tags; some may be nan."""

    def close(self) -> None:
        """End, and tell what is missing."""


def tag(name: str) -> str:
    """The tag of a number of the record, in groups: train/loss, validation/loss, speed/mfu."""
    if "/" in name:
        return name
    if name in SPEED:
        return f"speed/{name}"
    if name.startswith(VALIDATION):
        return f"validation/{name.removeprefix(VALIDATION)}"
    return f"train/{name}"


def run_id(folder: Path, program: str, make: Callable[[], str]) -> str:
    """The id that the run in a folder has at a program: that of an earlier start, or else a new one, which is kept."""
    file = folder / RUN_IDS
    try:
        ids = json.loads(file.read_bytes())
        known = {str(name): str(value) for name, value in ids.items()}
    except (OSError, ValueError, AttributeError):
        known = {}
    if program not in known:
        known[program] = make()
        replace_file(file, json.dumps(known, indent=2).encode() + b"\n")
    return known[program]


class TensorBoard:
    """Events in a folder that others may be in, those of an earlier attempt at later steps hidden.

    TensorBoard's own writer has a thread that ends with a traceback when the disk is full; its events are taken here,
    and written as records are.
    """

    def __init__(self, told: Told, folder: Path) -> None:
        self._folder, self._told = folder, told
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)

    def open(self) -> None:
        from torch.utils.tensorboard.summary import text

        events, first = event_types(), self._told.start + 1
        self._folder.mkdir(parents=True, exist_ok=True)
        start = events.Event(step=first, session_log=events.SessionLog(status=events.SessionLog.START))
        lines = json.dumps(self._told.settings, indent=2).splitlines()
        settings = text("configuration", "\n".join(f"    {line}" for line in lines))  # a block of code in Markdown
        shown = events.Event(step=first, summary=settings)
        self._file.create(self._framed(events.Event(file_version="brain.Event:2"), start, shown))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        events = event_types()
        self._file.append(
            self._framed(*(events.Event(step=step, summary=scalar(name, value)) for name, value in values.items()))
        )

    def close(self) -> None:
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


class LoggedRun(ABC):
    """What loggers share whose package gives a run that takes values by `log` and ends by `finish`."""

    where: str

    def __init__(self, told: Told) -> None:
        self._told = told
        self._run: Any = None
        self._reports = OptionalFile(f"the log of {self.where}")

    @abstractmethod
    def open(self) -> None: ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self._reports.attempt():
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        if self._run is not None:
            with self._reports.attempt():
                self._run.finish()


class WeightsAndBiases(LoggedRun):
    """A run at Weights & Biases, or in a folder of it below the run's."""

    where = "Weights & Biases"

    def open(self) -> None:
        import wandb

        told = self._told
        self._run = wandb.init(
            dir=str(told.folder),
            config=dict(told.settings),
            project=told.project,
            name=told.name,
            tags=told.tags or None,
            mode="offline" if told.offline else None,
            id=run_id(told.folder, "wandb", lambda: uuid4().hex[:12]),
            resume="allow",
        )


class Trackio(LoggedRun):
    """A run in the local store of Trackio, in TRACKIO_DIR or its own folder of the user's cache."""

    where = "Trackio"

    def open(self) -> None:
        import trackio

        told = self._told
        name = run_id(told.folder, "trackio", lambda: told.name or told.folder.resolve().name)
        self._run = trackio.init(
            project=told.project or "armature", name=name, config=dict(told.settings), resume="allow", embed=False
        )


class MLflow:
    """A run where MLFLOW_TRACKING_URI says, or else in a folder below the run's."""

    def __init__(self, told: Told) -> None:
        self._told, self._id = told, ""
        self._client: Any = None
        self._reports = OptionalFile("the log of MLflow")

    def open(self) -> None:
        from mlflow import MlflowClient

        told = self._told
        stated, folder = os.environ.get("MLFLOW_TRACKING_URI"), told.folder.resolve()
        self._client = client = MlflowClient(tracking_uri=stated or f"sqlite:///{folder}/mlflow.db")
        project = told.project or "armature"
        found = client.get_experiment_by_name(project)
        files = None if stated else (folder / "mlflow").as_uri()  # MLflow's own default is a folder where we stand
        if found is None:
            experiment = client.create_experiment(project, artifact_location=files)
        else:
            experiment = found.experiment_id
        begun = {"tags": dict.fromkeys(told.tags, ""), "run_name": told.name or told.folder.resolve().name}
        self._id = run_id(told.folder, "mlflow", lambda: client.create_run(experiment, **begun).info.run_id)
        client.update_run(self._id, status="RUNNING")
        client.log_dict(self._id, dict(told.settings), "config.json")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._reports.attempt():
            self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        if self._client is not None:
            with self._reports.attempt():
                self._client.set_terminated(self._id)
