"""How good a model is while it trains: perplexities and tasks every so many steps, in the record of the run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from core.config.errors import UserError
from core.config.text_file import read_text
from core.data.tokenizer import Tokenizer
from core.evaluate.perplexity import MOST_TEXT_MIB, SEQ_LEN, STRIDE, perplexity_of
from core.evaluate.scores import score_rows
from core.step.objective import Objective
from core.step.update import StepInfo
from core.train.observers import Observer


class Evaluator(Observer):
    """Measures the model as `python -m <model>.evaluate` does, on one rank; several have `validator.datasets`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Observer.Config):
        freq: int = 1000
        """Steps between two measurements."""
        perplexity: list[str] = field(default_factory=list)
        """Files of UTF-8 text, each predicted as one document: eval/NAME/nats_per_token and bits_per_byte."""
        tasks: list[str] = field(default_factory=list)
        """Tasks of lm_eval by their names: eval/TASK/METRIC."""
        include_path: str | None = None
        """A folder with YAML files of tasks of one's own."""
        limit: int | None = None
        """Ask so many questions of a task at most."""
        num_fewshot: int | None = None
        """Examples in front of each question; None is what the task says."""
        batch_tokens: int = 8192
        """Tokens in one forward, or one row."""

        def problems(self) -> Iterator[tuple[str, str]]:
            for name in ("freq", "batch_tokens", *(["limit"] if self.limit is not None else [])):
                if getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be at least 1"
            if not self.perplexity and not self.tasks:
                yield "perplexity", "nothing to measure: name files or tasks, or leave the observer out"
            if self.tasks and find_spec("lm_eval") is None:
                yield "tasks", "the package lm_eval is not installed: pip install lm_eval, or armature-core[eval]"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Observer

    def begin(self, objective: Objective, tokenizer: Tokenizer) -> None:
        """Keep the model, and read the texts. Raises `UserError` for several ranks, and a file that cannot be read."""
        if (world := objective.layout.degrees.world) > 1:
            raise UserError(
                f"observer {type(self).__name__} measures on one rank, and here are {world}: set validator.datasets, "
                "or evaluate the checkpoints"
            )
        self.objective, self.tokenizer = objective, tokenizer
        files = {Path(file).stem: Path(file).expanduser() for file in self.config.perplexity}
        self.texts = {name: read_text(file, MOST_TEXT_MIB) for name, file in files.items()}

    def after_step(self, info: StepInfo) -> Mapping[str, float] | None:
        if info.step % self.config.freq:
            return None
        (model,) = self.objective.stages
        model.eval()
        try:
            with self.objective.precision():
                return dict(self._measured())
        finally:
            model.train()

    def _measured(self) -> Iterator[tuple[str, float]]:
        c, (model,) = self.config, self.objective.stages
        seq_len = min(SEQ_LEN, model.config.max_seq_len)
        score = partial(score_rows, model, batch_tokens=c.batch_tokens)
        for name, text in self.texts.items():
            found = perplexity_of(text, self.tokenizer, score, seq_len=seq_len, stride=min(STRIDE, seq_len))
            yield f"eval/{name}/nats_per_token", found.nats_per_token
            yield f"eval/{name}/bits_per_byte", found.bits_per_byte
        if not c.tasks:
            return
        from core.evaluate.harness import HarnessModel, run_tasks  # loads lm_eval

        ends = frozenset(() if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])
        asked = HarnessModel(model, self.tokenizer, end_ids=ends, batch_tokens=c.batch_tokens)
        options = {"include_path": c.include_path, "limit": c.limit, "num_fewshot": c.num_fewshot}
        for task, metrics in run_tasks(asked, c.tasks, **options).items():
            yield from ((f"eval/{task}/{name}", value) for name, value in metrics.items())
