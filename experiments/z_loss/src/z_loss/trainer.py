"""The run of this experiment."""

from dataclasses import dataclass, field

from core.train.trainer import Trainer
from z_loss.loss import ZLoss


class ZLossTrainer(Trainer):
    """A training run whose loss has a z-loss; all else is as in any run."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        # pyrefly: ignore[bad-override-mutable-attribute] - this run has no other
        loss: ZLoss.Config = field(default_factory=ZLoss.Config)
        """Cross-entropy, and how much the square of the log-partition counts."""
