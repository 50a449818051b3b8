"""The end of a run: what it returns, what there is now, and the commands that work on that."""

import logging
import shlex
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint.find import Found
from core.checkpoint.storage import seen_from
from core.config.decode import is_inside
from core.config.errors import UserError
from core.config.fields import walk
from core.config.outside import NAMED
from core.parallel.layout import RankView
from core.runtime.device import peak_memory
from core.runtime.launcher import World
from core.runtime.log import WIDTH, event
from core.runtime.records import best_record
from core.runtime.units import duration, size_text
from core.train.checkpoints import RunCheckpoints
from core.train.metrics import Record, last_record
from core.train.summary import ReportedRun
from core.weights.hf_model import StoredModel, with_hf

log = logging.getLogger("armature")

SAVED_WORDS = {"full": "weights and optimizer", "model": "weights alone"}
"""What a checkpoint holds."""


class RunResult(NamedTuple):
    """What a run leaves to the program that ran it."""

    record: Record | None
    """The last one; None where a run that was finished before has none in its folder."""
    folder: Path
    """The run's folder."""


class Outcome:
    """Tells how a run ended, what it left, and which commands work on that. `model` needs no memory."""

    def __init__(
        self,
        run: ReportedRun,
        model: StoredModel,
        world: World,
        checkpoints: RunCheckpoints,
        layout: RankView,
        folder: Path,
        last_step: int,
    ) -> None:
        self.run, self.model, self.world, self.checkpoints, self.layout = run, model, world, checkpoints, layout
        self.folder, self.last_step = folder, last_step

    def __call__(self, step: int, cause: str, seconds: float, record: Record | None) -> RunResult:
        """The end of a run that trained up to `step`, where `cause` stopped it, and reported `record` last."""
        how = f"finished {step:,} steps"
        if cause:
            how = f"stopped by {cause} after step {step} of {self.last_step}"
        memory = size_text(peak_memory(self.layout.device))
        lines = [how, f"took {duration(seconds)}, at most {memory} of memory"]
        return self._tell(lines, step, record, extra=event("end", step, text=how))

    def again(self) -> RunResult:
        """The end of a run that was finished before. Every rank must call it."""
        record = self.checkpoints.ranks.first(lambda: last_record(self.folder))
        step, saved = self.checkpoints.start.step, self.checkpoints.last_saved()
        how = [f"finished before, after {step:,} steps: nothing was changed"]
        if saved is not None and saved.manifest.kind == "model":
            how.append(f"another run may begin with --checkpoint.initial_load_path {self.folder}")
        elif step == self.run.training.steps:
            how.append("a larger --training.steps goes on")
        return self._tell(how, step, record)

    def _tell(
        self, lines: list[str], step: int, record: Record | None, extra: dict[str, Any] | None = None
    ) -> RunResult:
        if self.layout.is_first:
            saved, left = self.checkpoints.last_saved(), max(self.last_step - step, 0)
            lines += [
                *losses(self.folder, record),
                f"kept in {self.folder}:",
                *columns(contents(self.run, self.folder, saved)),
            ]
            if saved is None:
                lines.append("weights were not saved: --checkpoint.enable saves them")
            for purpose, words in next_commands(self.run, self.model, self.world, self.folder, saved, left):
                lines += [f"# {purpose}", command(words)]
        log.info("\n".join(lines), extra=extra)
        return RunResult(record, self.folder)


def losses(folder: Path, record: Record | None) -> Iterator[str]:
    """How good the run is: its last loss, and the best on held-out text."""
    if record is None:
        return
    yield f"loss {record.loss:.4f} at step {record.step:,}"
    best = best_record(folder, "validation_loss")
    if best is not None:
        yield f"best validation loss {best['validation_loss']:.4f} at step {best['step']:,}"


def columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and what they mean, side by side."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {meaning}" for name, meaning in rows]


def contents(run: ReportedRun, folder: Path, saved: Found | None) -> Iterator[tuple[str, str]]:
    """What is there, and what it is for."""
    there = {
        "config.json": "every setting",
        "metrics.jsonl": "the curve, in lines of JSON",
        run.metrics.save_tb_folder: "the curve, for TensorBoard",
        run.profiling.save_traces_folder: "traces of steps",
        run.profiling.save_memory_snapshot_folder: "where the memory of steps goes",
        "events.jsonl": "starts, saves, steps left out",
        "logs": "what each rank said",
    }
    yield from ((name, what) for name, what in there.items() if (folder / name).exists())
    if saved is not None:
        n_bytes = sum(file.n_bytes for file in saved.manifest.files.values())
        yield seen_from(folder, str(saved)), f"{SAVED_WORDS[saved.manifest.kind]}, {size_text(n_bytes)}"


def next_commands(
    run: ReportedRun, model: StoredModel, world: World, folder: Path, saved: Found | None, left: int
) -> Iterator[tuple[str, list[list[str]]]]:
    """What can be done now: the purpose, and the words of the command, an option with its values in one group.

    They are commands of the package whose `train` runs, or else of the package that the model is from."""
    packages = [calling_package(), type(model).__module__.rpartition(".")[0]]
    write, train, convert = (command_module(command, packages) for command in ("generate", "train", "convert"))
    yield "look at it, in a page for a browser", [["python", "-m", "core.report"], [str(folder)]]
    if run.metrics.enable_tensorboard:
        yield "see the curve", [["tensorboard"], ["--logdir", str(folder / run.metrics.save_tb_folder)]]
    if saved is None:
        return
    place = str(folder)
    if saved.storage.is_local and write:
        options = [["--checkpoint", place], ["--prompt", "def main"], *trust_options(model.config, write)]
        yield "write text", [["python", "-m", write], *options]
    if saved.manifest.kind == "full" and train:
        for purpose, words in goes_on(run, train, world, folder, saved.manifest.progress.step, left):
            yield purpose, words + trust_options(run, train)
    exported = folder / f"hf-{saved.manifest.progress.step}"
    if saved.storage.is_local and convert and expressible(model) and not exported.exists():
        yield (
            "export to a Hugging Face folder",
            [["python", "-m", convert, "to-hf"], [place], [str(exported)], *trust_options(model.config, convert)],
        )


def goes_on(
    run: ReportedRun, module: str, world: World, folder: Path, step: int, left: int
) -> Iterator[tuple[str, list[list[str]]]]:
    """How more steps are made of the run, which stands at `step`."""
    start = [["python", "-m", module]]
    purpose = "go on" if left else f"go on, to step {2 * step}"
    if 1 < world.size == world.local_size:
        start = [["torchrun", "--nproc-per-node", str(world.size), "-m", module]]
    elif world.size > 1:
        purpose += f" (behind your launcher, on {world.size} ranks)"
    options = [["--config", str(folder)], ["--dump_folder", str(folder)]]
    if not left and step == run.training.steps:
        options.append(["--training.steps", str(2 * step)])
    elif not left:
        return  # the data have come to their end
    settings = run.checkpoint
    if settings.resume == "never":
        options.append(["--checkpoint.resume", "auto"])
    if settings.load_step != -1:
        options.append(["--checkpoint.load_step", "-1"])
    yield purpose, start + options


def trust_options(config: object, command: str) -> list[list[str]]:
    """--trust with the modules and files that this process was told of by name, where the configuration has a class
    that is neither core's nor of the command's own package."""
    modules = [type(node).__module__ for _, node in walk(config)]
    known = ("core", command.partition(".")[0])
    foreign = any(not any(is_inside(module, package) for package in known) for module in modules)
    return [["--trust", *NAMED.values()]] if foreign and NAMED else []


def calling_package() -> str:
    """The package whose `train` this process is; empty for another program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    package, _, command = (spec.name if spec else "").rpartition(".")
    return package if command == "train" else ""


def command_module(command: str, packages: Iterable[str]) -> str:
    """The module of a command in the first of the packages that has it; empty where none has."""
    return next((f"{name}.{command}" for name in packages if name and find_spec(f"{name}.{command}")), "")


def expressible(model: StoredModel) -> bool:
    """Whether Hugging Face has such a model."""
    try:
        with_hf(model).to_hf_config()
    except UserError:
        return False
    return True


def command(words: list[list[str]]) -> str:
    """A command as a line for a shell, or as several where it is long; each group of words stays together."""
    lines: list[str] = []
    for text in map(shlex.join, words):
        if lines and len(f"{lines[-1]} {text} \\") <= WIDTH:
            lines[-1] += f" {text}"
        else:
            lines.append(f"  {text}" if lines else text)
    return " \\\n".join(lines)
