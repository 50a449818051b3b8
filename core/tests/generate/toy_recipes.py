"""Recipes for the command line's tests."""

from dataclasses import dataclass

from core.config.configurable import Configurable
from core.testing.toy import Toy
from core.train.trainer import Trainer


def toy() -> Trainer.Config:
    """A toy with a row for each token of the bundled tokenizer."""
    return Trainer.Config(model=Toy.Config(vocab_size=2048))


class Other(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        size: int = 1
        """No run has this."""


def no_run() -> Other.Config:
    """Something else."""
    return Other.Config()
