"""Training on rows of random tokens, for benchmarks: a `Trainer` that needs neither text nor a folder to keep."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch

from core.checkpoint.settings import Checkpoint
from core.data.packing import IGNORE, Batch
from core.data.samples import Samples
from core.data.tokenizer import Tokenizer
from core.train.trainer import Trainer
from core.train.validate import Validator

STEPS = 1000
"""The length of a run, of which a benchmark takes the steps that it wants."""


class Numbers(Tokenizer):
    """A vocabulary without words, which no package has to read."""

    @dataclass(kw_only=True, slots=True)
    class Config(Tokenizer.Config):
        vocab_size: int
        """How many ids there are."""

    def __init__(self, config: Config) -> None:
        self.vocab_size = config.vocab_size
        self.description = self.fingerprint = f"{config.vocab_size:,} numbers"


class RandomRows(Samples):
    """Rows of random ids of the vocabulary, drawn by the seed and the number of the row."""

    @dataclass(kw_only=True, slots=True)
    class Config(Samples.Config):
        document_tokens: int | None = None
        """The length of the documents in a row; None is one document."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Samples

    def open(self) -> None:
        self.description = self.fingerprint = "random tokens"

    def rows(self, first: int, count: int) -> Batch:
        size = self.config.document_tokens or self.seq_len
        place_BL = torch.arange(self.seq_len).expand(count, -1)
        tokens_BL = torch.stack([self._row(number) for number in range(first, first + count)])
        opens_BL = torch.arange(1, self.seq_len + 1) % size == 0
        labels_BL = torch.where(opens_BL, IGNORE, tokens_BL[:, 1:]) if size < self.seq_len else tokens_BL[:, 1:]
        return Batch(tokens_BL[:, :-1].contiguous(), labels_BL.contiguous(), place_BL % size, place_BL // size)

    def _row(self, number: int) -> torch.Tensor:
        draws = torch.Generator().manual_seed(self.seed + number)
        return torch.randint(self.tokenizer.vocab_size, (self.seq_len + 1,), generator=draws)


@contextmanager
def random_run(
    config: Trainer.Config, device: torch.device, *, document_tokens: int | None = None
) -> Iterator[Trainer]:
    """A run of `config` on random rows, whose steps the block takes: `trainer.step(1)`, ... Nothing is kept of it."""
    config.training.device, config.training.steps = device.type, STEPS
    config.tokenizer = Numbers.Config(vocab_size=config.model.vocab_size)
    config.dataloader = RandomRows.Config(document_tokens=document_tokens)
    config.validator, config.checkpoint = Validator.Config(), Checkpoint()
    with TemporaryDirectory() as folder:
        config.dump_folder = f"{folder}/run"
        trainer = Trainer(config)
        with trainer.exit, closing(trainer.rows):
            yield trainer
