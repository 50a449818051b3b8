"""The command line of evaluation: `python -m <model>.evaluate`."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from core.config import cli
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.fields import Problem
from core.config.help import OwnOption, show, usage
from core.config.recipe import recipe_module, recipes
from core.config.text_file import read_text
from core.evaluate.perplexity import MOST_TEXT_MIB, SEQ_LEN, STRIDE, Perplexity, perplexity_of
from core.evaluate.scores import score_rows
from core.generate.command import WRITING_OPTIONS, chosen_settings, note, recipe_settings
from core.generate.folder import FolderModel, end_ids
from core.runtime.live import line_on

MEASURED_BY = {
    "checkpoint": OwnOption("FOLDER", "the weights: a run, a checkpoint, what convert wrote, or a Hugging Face folder"),
    "perplexity": OwnOption("FILE ...", "texts that the model is to predict"),
    "tasks": OwnOption("TASK ...", "tasks of lm_eval (needs the `eval` extra)"),
}
"""Settings that are explained with those options, because there is nothing to do without them."""


def main(
    configs: str | ModuleType, argv: Sequence[str] | None = None, command: "type[Evaluation] | None" = None
) -> None:
    """Measure the model of a folder of weights; mistakes of the user end as in training. `command` is an `Evaluation`
    of other models than core's."""
    command = command or Evaluation
    with exit_plainly():
        own, settings = cli.own_flags(cli.split_flags(argv), WRITING_OPTIONS)
        if cli.told_version(own, configs):
            return
        configs = recipe_module(configs)
        known = recipes(configs)
        if "print_completion" in own:
            of_recipe = partial(recipe_settings, command, configs=configs, trust=())
            show(cli.completion(own["print_completion"][0], WRITING_OPTIONS, known, lambda name: of_recipe([name])))
            return
        line = "--checkpoint FOLDER [--perplexity FILE ...] [--tasks TASK ...]"
        title = f"{usage(line, WRITING_OPTIONS | MEASURED_BY)}\n\nrecipes: {', '.join(known)}"
        config = chosen_settings(command, own, settings, configs)
        if config is None:
            show(title)
            if "help" not in own:
                raise UserError("choose weights: --checkpoint FOLDER")
            return
        heading = title if not own.get("help") else config.checkpoint or " ".join(own.get("config", list(known)[:1]))
        cli.settle_and_run(config, heading, own, settings, WRITING_OPTIONS)


class Evaluation(FolderModel):
    """How good the model of a folder of weights is."""

    @dataclass(kw_only=True, slots=True)
    class Config(FolderModel.Config):
        perplexity: list[str] = field(default_factory=list)
        """Files of UTF-8 text, each predicted as one document."""
        tasks: list[str] = field(default_factory=list)
        """Tasks of lm_eval by their names."""
        include_path: str | None = None
        """A folder with YAML files of tasks of one's own."""
        limit: int | None = None
        """Ask so many questions of a task at most."""
        num_fewshot: int | None = None
        """Examples in front of each question; None is what the task says."""
        seq_len: int = SEQ_LEN
        """Tokens of text that are seen at once for `perplexity`, at most model.max_seq_len."""
        stride: int = STRIDE
        """So many of them are predicted, behind the others; the smaller, the longer it takes."""
        batch_tokens: int = 8192
        """Tokens in one forward, or one row."""
        out: str | None = None
        """A file for the results as JSON."""

        def problems(self) -> Iterator[Problem]:
            yield from super().problems()
            if not self.perplexity and not self.tasks:
                yield "perplexity", "nothing to measure: give --perplexity FILE, --tasks TASK, or both"
            if self.tasks and find_spec("lm_eval") is None:
                yield "tasks", "the package lm_eval is not installed: pip install lm_eval, or armature-core[eval]"
            for name in ("seq_len", "stride", "batch_tokens", *(["limit"] if self.limit is not None else [])):
                if getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be at least 1"
            if self.stride > self.seq_len:
                yield "stride", f"stride {self.stride} must be at most seq_len {self.seq_len}"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.texts = {file: read_text(Path(file).expanduser(), MOST_TEXT_MIB) for file in config.perplexity}
        self.model = self.load(ragged=bool(config.tasks))

    def run(self) -> None:
        """Print the results, and write them where a file is named."""
        for line in self.summary(self.model):
            note(line)
        found: dict[str, Any] = {"checkpoint": str(self.folder)}
        if self.texts:
            with line_on(sys.stderr):
                found["perplexity"] = {file: self.perplexity(text)._asdict() for file, text in self.texts.items()}
            show(perplexity_table(found["perplexity"]))
        if self.config.tasks:
            found["tasks"] = self.tasks()
            show(task_table(found["tasks"]))
        if self.config.out is not None:
            try:
                Path(self.config.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {self.config.out}: {error.strerror}; choose another --out") from error
            note(f"written to {self.config.out}")

    def perplexity(self, text: str) -> Perplexity:
        """How well a text is predicted."""
        c = self.config
        seq_len = min(c.seq_len, c.model.max_seq_len)
        score = partial(score_rows, self.model, batch_tokens=c.batch_tokens)
        return perplexity_of(text, self.tokenizer, score, seq_len=seq_len, stride=min(c.stride, seq_len))

    def tasks(self) -> dict[str, dict[str, float]]:
        """The results of lm_eval's tasks, by task and metric."""
        from core.evaluate.harness import HarnessModel, run_tasks  # loads lm_eval

        c = self.config
        ends = end_ids(self.tokenizer, self.folder)
        asked = HarnessModel(self.model, self.tokenizer, end_ids=ends, batch_tokens=c.batch_tokens, reader=self.cached)
        options = {"include_path": c.include_path, "limit": c.limit, "num_fewshot": c.num_fewshot}
        return run_tasks(asked, c.tasks, **options)


def perplexity_table(found: dict[str, dict[str, float]]) -> str:
    """The perplexity of each file, a line each."""
    width = max(map(len, found))
    lines = [f"{'':{width}}  {'tokens':>10}  nats/token  perplexity  bits/byte"]
    for file, each in found.items():
        numbers = f"{each['nats_per_token']:10.4f}  {each['perplexity']:10.3f}  {each['bits_per_byte']:9.4f}"
        lines.append(f"{file:{width}}  {each['n_tokens']:10,}  {numbers}")
    return "\n".join(lines)


def task_table(found: dict[str, dict[str, float]]) -> str:
    """The metrics of each task, a line each."""
    rows = [(task, name, value) for task, metrics in found.items() for name, value in metrics.items()]
    of_task, of_name = max(len(task) for task, _, _ in rows), max(len(name) for _, name, _ in rows)
    return "\n".join(f"{task:{of_task}}  {name:{of_name}}  {value:.4f}" for task, name, value in rows)
