"""The short run that every model's debug recipe is."""

from core.checkpoint.settings import Checkpoint
from core.nn.decoder import Decoder
from core.optim.adam import AdamW
from core.optim.schedule import Schedule
from core.step.settings import Training
from core.train.trainer import Trainer
from core.train.validate import Validator


def debug_run(model: Decoder.Config) -> Trainer.Config:
    """A run of about two minutes on a laptop's CPU for a model of a million weights, on the text that is there."""
    return Trainer.Config(
        model=model,
        training=Training(steps=400, seq_len=256, local_batch_size=8),
        optimizer=AdamW.Config(lr=4e-3),
        lr_scheduler=Schedule.Config(warmup_steps=10, decay_ratio=0.8, min_lr_factor=0.1),
        validator=Validator.Config(enable=True, freq=100, steps=16),
        checkpoint=Checkpoint(enable=True),
    )
