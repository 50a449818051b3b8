"""A recipe for the command line's tests."""

from core.testing.toy import Toy
from core.train.trainer import Trainer


def toy() -> Trainer.Config:
    """A toy with a row for each token of the bundled tokenizer."""
    return Trainer.Config(model=Toy.Config(vocab_size=2048))
