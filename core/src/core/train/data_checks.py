"""What must hold between a run's settings, its text and its tokenizer."""

from collections.abc import Iterator

from core.checkpoint.manifest import Progress
from core.config.errors import UserError
from core.config.fields import Problem
from core.data.samples import Samples
from core.data.tokenizer import Tokenizer
from core.nn.decoder import Decoder
from core.step.settings import Training
from core.train.validate import Validator


def data_problems(
    training: Training, model: Decoder.Config, dataloader: Samples.Config, validator: Validator.Config
) -> Iterator[Problem]:
    """Rows longer than the model allows, and a validator without rows."""
    if training.seq_len > model.max_seq_len:
        yield (
            "training.seq_len",
            f"seq_len {training.seq_len} exceeds model.max_seq_len {model.max_seq_len}: "
            "shorten the rows or raise the model's limit",
        )
    if validator.enable and not validator.datasets:
        yield from ((f"dataloader.{name}", message) for name, message in dataloader.validation_problems())


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` when the tokenizer makes ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, model.vocab_size is {vocab_size:,}: "
            f"set --model.vocab_size {tokenizer.vocab_size} or choose another tokenizer"
        )


def last_step(training: Training, loader: Samples, rows_per_step: int, start: Progress) -> int:
    """The last step that a run has data for, which goes on from `start`; at most `training.steps`."""
    if loader.n_rows is None:
        return training.steps
    last = min(training.steps, start.step + (loader.n_rows - start.rows) // rows_per_step)
    if last == 0:
        raise UserError(
            f"the data have {loader.n_rows} rows of {training.seq_len} tokens, one step takes {rows_per_step}: "
            "lower the batch size or training.seq_len, or give more text or epochs"
        )
    return last
